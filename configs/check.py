"""Checks a whole experiment before its first stage runs, so that a typo in the last costs no hours.

    python -m configs.check NUM_PROCESSES FILE [key=value ...] [-- FILE ...]

train_flowtok.sh calls it: one `FILE key=value ...` group a stage. Each stage's config is loaded; image shards that must
already exist are looked for; batch sizes must divide by the processes; token counts must agree from stage to stage.
"""

import sys

from configs.load import exit_on_error, load_config
from configs.schema import (
    FlowTokStage,
    ReportStage,
    StageConfig,
    TextEncoderStage,
    TextProjectorStage,
    TokenizerStage,
    TokensStage,
)
from data.tar import expand_shards


def check_batches(configs: list[StageConfig], num_processes: int) -> None:
    """Every batch size is divisible by processes x gradient accumulation."""
    for config in configs:
        training = getattr(config, "training", None)
        if training is not None and training.batch_size % (num_processes * training.gradient_accumulation):
            raise ValueError(
                f"stage {config.stage}: training.batch_size {training.batch_size} is not divisible by processes x "
                f"gradient_accumulation = {num_processes} x {training.gradient_accumulation}"
            )


def check_shards(configs: list[StageConfig]) -> None:
    """Image shards exist; token shards are written on the way and can't be looked for yet."""
    for config in configs:
        patterns: list[str] = []
        if isinstance(config, TextEncoderStage | TokenizerStage | TokensStage):
            patterns += config.data.shards
        if isinstance(config, TokenizerStage):
            patterns += config.pictures.shards
        if isinstance(config, ReportStage):
            patterns += config.train_shards + config.heldout_shards + config.distractor_shards
        try:
            if patterns:
                expand_shards(sorted(set(patterns)))
        except ValueError as error:
            raise ValueError(f"stage {config.stage}: {error}") from error


def check_sizes(configs: list[StageConfig]) -> None:
    """Tokens, channels and text states have the same sizes in every stage that has them."""
    sizes: dict[str, tuple[str, int]] = {}
    for config in configs:
        found = {}
        if isinstance(config, TextEncoderStage):
            found = {"text tokens": config.clip.context_length, "text width": config.clip.text_width}
        if isinstance(config, TokenizerStage):
            part = config.tokenizer
            found = {"image tokens": part.num_tokens, "channels": part.token_channels}
            if part.text_guidance:
                found |= {"text tokens": part.text_tokens, "text width": part.text_width}
        if isinstance(config, TextProjectorStage | FlowTokStage):
            part = config.projector
            found = {"text tokens": part.text_tokens, "text width": part.text_width, "channels": part.token_channels}
            found["image tokens"] = part.text_tokens  # text flows into image token by token
        for name, size in found.items():
            stage, first = sizes.setdefault(name, (config.stage, size))
            if size != first:
                raise ValueError(f"{name}: stage {stage} has {first}, stage {config.stage} has {size}; they must agree")


def main(arguments: list[str]) -> None:
    """Load the configs of all groups and run every check."""
    num_processes, groups = int(arguments[0]), [[]]
    for argument in arguments[1:]:
        groups.append([]) if argument == "--" else groups[-1].append(argument)
    configs = [load_config(file, overrides) for file, *overrides in groups]
    check_batches(configs, num_processes)
    check_shards(configs)
    check_sizes(configs)


if __name__ == "__main__":
    exit_on_error(lambda: main(sys.argv[1:]))
