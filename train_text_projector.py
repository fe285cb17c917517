"""Stage 2: train the text projector by itself, text states to z_T (paper, Sec. 3.3).

    accelerate launch train_text_projector.py --config configs/emoji/text_projector.yaml [key=value]

In: token shards, the tokenizer's run. Out: a run folder; stage 3 starts from its EMA weights.
Losses: KL and contrastive alignment (modeling/losses.py); with image_regression_weight, z_T's mean
is regressed onto z_I's mean, which the demo needs and the paper has not.
The same command resumes, and does nothing when the run is complete.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from configs.load import parse_stage_args
from data.readers import TokenTextConfig
from modeling.layers import check_least
from modeling.losses import (
    ProjectorLossConfig,
    freeze_unused_alignment,
    has_projector_loss,
    latent_statistics,
    loss_weights,
    projector_losses,
    weighted_terms,
)
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import load_tokenizer, text_encoder_config
from training.loop import train_network
from training.pictures import caption_grid, pair_rows, sample_path, save_png
from training.run import save_config, start_run
from training.stage import TrainedStage
from training.tokens import StoredTokens, load_tokens_info, open_stored_tokens, projector_sizes

NUM_PICTURES = 24  # the first samples


@dataclass
class TextProjectorStage(TrainedStage):
    """What can be set in text_projector.yaml, besides the parts' own fields."""

    # whose tokens are read, with its text tower and sizes; decodes the pictures
    tokenizer_run: str = "${experiment_dir}/tokenizer"
    projector: TextProjectorConfig = field(default_factory=TextProjectorConfig)
    # strength of the ridge regression that fills projector.linear_skip, times the mean eigenvalue
    # of the captions' kernel
    linear_start: float = 0.0
    data: TokenTextConfig = field(default_factory=TokenTextConfig)
    losses: ProjectorLossConfig = field(default_factory=ProjectorLossConfig)

    stage = "text_projector"
    networks = ("projector",)

    def check(self) -> None:
        super().check()
        if not has_projector_loss(self.losses):
            raise ValueError("losses: all weights are 0, expected one above it")
        check_least(self, 0, "linear_start")
        if self.projector.linear_skip != (self.linear_start > 0):
            raise ValueError(
                f"projector.linear_skip={self.projector.linear_skip} with linear_start="
                f"{self.linear_start}: the skip is filled by a ridge regression of that strength"
            )

    def token_shards(self) -> list[str]:
        return self.data.all_shards()


def main(config: TextProjectorStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    # What earlier stages gave: tokens, and the tokenizer whose text tower and sizes are used.
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    tokenizer = load_tokenizer(config.tokenizer_run)
    text_config = text_encoder_config(config.tokenizer_run)
    info = load_tokens_info(config.data, tokenizer, config.tokenizer_run)
    config.projector = replace(config.projector, **projector_sizes(tokenizer.config))
    # A complete run ends here: it needs no tokens.
    if is_complete(run, config, info.inputs()):
        return
    tokens = open_stored_tokens(run, config.data, training, info, text_config)

    # The projector; what is measured once is part of its weights.
    has_checkpoint = latest_checkpoint(run.folder) is not None
    projector = TextProjector(config.projector)
    if not has_checkpoint:
        tokens.fit_whitening(projector)
        if config.linear_start:
            tokens.fit_linear_skip(projector, config.linear_start)
    # A weight without a gradient would make DDP wait for it.
    freeze_unused_alignment(projector, config.losses)
    save_config(run, config, has_checkpoint)
    train_network(
        run=run,
        stage=config,
        module=projector,
        loss_fn=partial(compute_losses, config, tokens),
        loader=tokens.loader,
        inputs=info.inputs(),
        save_samples=partial(save_decoded, config, tokens),
    )


def compute_losses(
    config: TextProjectorStage, tokens: StoredTokens, projector: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviations of z_T."""
    # Only the KL needs z_T drawn: the alignment and the regression see its mean otherwise.
    output = projector(tokens.text_states(batch), sample=config.losses.kl_weight > 0)
    image_mean = tokens.image_posterior(batch).mean * tokens.info.latent_scale  # B x K x C
    terms = projector_losses(config.losses, output, image_mean)
    # The raw terms are logged: a weight that is changed does not hide how they go on.
    loss = sum(weighted_terms(terms, loss_weights(config.losses)).values())
    return terms | {"loss": loss} | latent_statistics(output.mean)


@torch.no_grad()
def save_decoded(
    config: TextProjectorStage, tokens: StoredTokens, projector: TextProjector, step: int
) -> None:
    """Grid: the true image left, z_T decoded without the flow right."""
    # Without the regression z_T has nothing to do with the image.
    if not config.losses.image_regression_weight:
        return
    run = tokens.run
    # The same samples at every step, so that pictures can be compared.
    batch = next(tokens.reader.once(NUM_PICTURES, limit=NUM_PICTURES))
    # Loaded for the picture only: training needs no image tokenizer.
    tokenizer = load_tokenizer(config.tokenizer_run).to(run.device)
    states = tokens.text_states(batch)
    true = tokenizer.decode(tokens.image_posterior(batch).mean, states)
    latents = projector.posterior(states).mean / tokens.info.latent_scale
    pairs = pair_rows(true, tokenizer.decode(latents, states))
    save_png(caption_grid(pairs, batch["caption"], columns=4), sample_path(run.folder, step))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TextProjectorStage, __doc__)))
