"""Text to image with discrete codes: predict a dual tokenizer's indices, scale by scale.

    accelerate launch train_next_scale.py --config configs/emoji_dual/next_scale.yaml [key=value]
    python sample.py --run runs/emoji_dual --prompts "black cat, animal mammal"

In: image shards with captions, the run of a dual tokenizer, which encodes them in the loop. Out: a
run folder, from whose EMA weights sample.py draws. Loss: cross-entropy of the indices, mean over
all tokens, so that large scales count most (TokenFlow, modeling/next_scale.py). The same command
resumes, and does nothing when the run is complete.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.load import parse_stage_args
from data.images import ImageTextConfig, image_reader
from data.readers import Reader
from modeling.activation_checkpointing import ActivationCheckpointing, set_activation_checkpointing
from modeling.dual_tokenizer import DualTokenizer, DualTokens
from modeling.layers import check_least, fingerprint
from modeling.next_scale import (
    NextScale,
    NextScaleConfig,
    NextScaleGenerator,
    NextScaleSampling,
    known_inputs,
)
from modeling.text_encoder import TextEncoder
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import find_text_encoder, load_dual_tokenizer
from training.loop import train_network
from training.pictures import caption_grid, sample_path, save_png
from training.provenance import check_shards, save_source
from training.ridge import fit_linear_skip
from training.run import Run, save_config, start_run
from training.stage import TrainedStage, open_stream
from training.tokens import FITTED_SAMPLES, encode_images, text_states


@dataclass
class DrawnPictures:
    """The pictures on the way, which sample.py also draws without prompts."""

    captions: list[str] = field(default_factory=list)


@dataclass
class NextScaleStage(TrainedStage):
    """What can be set in next_scale.yaml, besides the parts' own fields."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"  # of a dual tokenizer; its text tower reads
    next_scale: NextScaleConfig = field(default_factory=NextScaleConfig)
    activation_checkpointing: ActivationCheckpointing = "none"
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    sampling: NextScaleSampling = field(default_factory=NextScaleSampling)
    pictures: DrawnPictures = field(default_factory=DrawnPictures)
    # strength of the ridge regression that fills the network's linear skip, times the mean
    # eigenvalue of the captions' kernel; 0: no skip
    linear_start: float = 0.0

    stage = "next_scale"
    networks = ("next_scale", "tokenizer_run")

    def check(self) -> None:
        super().check()
        check_least(self, 0, "linear_start")
        self.sampling.check_network(self.next_scale)

    def image_shards(self) -> list[str]:
        return self.data.all_shards()


@dataclass(frozen=True)
class Parts:
    """What losses and pictures read."""

    run: Run
    tokenizer: DualTokenizer
    text_encoder: TextEncoder

    def encode(self, batch: dict) -> tuple[Tensor, DualTokens]:
        """Text states B x L x T and tokens of a batch, in the run's precision."""
        states = text_states(self.run, self.text_encoder, batch)
        return states, encode_images(self.run, self.tokenizer, batch)


def main(config: NextScaleStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    # What stage 1 gave, and the sizes that follow from it.
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    tokenizer = load_dual_tokenizer(config.tokenizer_run).to(run.device)
    text_encoder = find_text_encoder(config.tokenizer_run).to(run.device)
    parts = Parts(run, tokenizer, text_encoder)
    length, width = text_encoder.shape
    config.next_scale = replace(
        config.next_scale,
        text_tokens=length,
        text_width=width,
        text_is_masked=text_encoder.masks_padding,
        quantizer=tokenizer.config.quantizer,
        linear_skip=config.linear_start > 0,
    )
    inputs = {"tokenizer": fingerprint(tokenizer), "text_encoder": text_encoder.identity}
    # A complete run is left alone, before anything long begins.
    shards = check_shards(run, config.data, training.max_steps)
    if is_complete(run, config, inputs):
        return

    # Images and captions, the network.
    reader = image_reader(config.data, tokenizer.config.image_size, text_encoder.tokenize)
    loader = open_stream(run, training, reader)
    model = NextScale(config.next_scale)
    set_activation_checkpointing(model, config.activation_checkpointing)
    has_checkpoint = latest_checkpoint(run.folder) is not None
    # A checkpoint has the skip among its weights.
    if config.linear_start and not has_checkpoint:
        fit_skip(config, parts, model, reader)
    save_config(run, config, has_checkpoint)
    save_source(run.folder, shards)
    train_network(
        run=run,
        stage=config,
        module=model,
        loss_fn=partial(compute_losses, config, parts),
        loader=loader,
        inputs=inputs,
        save_samples=partial(save_drawn, config, parts) if config.pictures.captions else None,
    )


def fit_skip(config: NextScaleStage, parts: Parts, model: NextScale, reader: Reader) -> None:
    """Fill the linear skip by ridge regression on the first samples; give it the codes."""
    pairs = [parts.encode(batch) for batch in reader.once(100, limit=FITTED_SAMPLES)]
    states = torch.cat([states.float().cpu() for states, _ in pairs])
    codes = torch.cat([tokens.mean.float().cpu() for _, tokens in pairs])
    fit_linear_skip(model.skip, states, codes, config.linear_start)
    model.codes.copy_(parts.tokenizer.quantizer.codes().detach())


def compute_losses(
    config: NextScaleStage, parts: Parts, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Cross-entropy of a batch, of each scale; top1: how often the likeliest index is true."""
    # What is to be predicted, and what is known at each place.
    device, scales = parts.run.device, config.next_scale.quantizer.scales
    states, (_, indices) = parts.encode(batch)
    with torch.no_grad():
        maps = parts.tokenizer.quantizer.code_maps(indices)
        features = known_inputs(config.next_scale, maps)

    # Captions are dropped by sample, for guidance.
    dropped = torch.rand(len(states), device=device) < config.next_scale.null_probability
    logits = model(features, states, dropped).float()
    losses = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
    losses = losses.unflatten(0, indices.shape)
    terms = {"loss": losses.mean(), "top1": (logits.argmax(-1) == indices).float().mean()}
    for scale, part in zip(scales, losses.split([s**2 for s in scales], dim=1), strict=True):
        terms[f"loss/{scale}"] = part.mean()
    return terms


@torch.no_grad()
def save_drawn(config: NextScaleStage, parts: Parts, model: NextScale, step: int) -> None:
    """Images of the configured captions, by the EMA weights."""
    generator = NextScaleGenerator(parts.text_encoder, parts.tokenizer, model)
    captions = config.pictures.captions
    images, _ = generator.generate(captions, config.sampling)
    save_png(caption_grid(images, captions, columns=4), sample_path(parts.run.folder, step))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(NextScaleStage, __doc__)))
