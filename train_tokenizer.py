"""Stage 1: train the image tokenizer (TA-TiTok with RoPE and SwiGLU, a VAE; paper, Sec. 3.2), or a
dual tokenizer of discrete codes where the config has `dual` (docs/dual_tokens.md).

    accelerate launch train_tokenizer.py --config configs/emoji/tokenizer.yaml [key=value ...]
    python train_tokenizer.py --config configs/emoji/tokenizer.yaml training.max_steps=100

The second: one process. In: image shards with captions. Out: a run folder; its EMA weights encode
images to K x C tokens and decode them. K is the text tower's number of tokens, if
tokenizer.num_tokens sets none.
Losses: pixels, perceptual (modeling/perceptual.py), adversarial from a step on
(modeling/discriminator.py), KL; each is off by weight 0. Watch channels_in_use and posterior_std:
a posterior collapse shows there first; of a dual tokenizer usage and perplexity.
The same command resumes, and does nothing when the run is complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.load import parse_stage_args
from data.images import ImageTextConfig, image_reader
from data.tar import expand_shards
from eval.images import ImageSet, list_images
from eval.reconstruction import ReconstructionEvaluation, ReconstructionEvaluationConfig
from modeling.activation_checkpointing import ActivationCheckpointing, set_activation_checkpointing
from modeling.discriminator import (
    AdversarialConfig,
    Discriminator,
    discriminator_loss,
    generator_loss,
)
from modeling.dual_quantizer import DualQuantizer
from modeling.dual_tokenizer import DualTokenizer, DualTokenizerConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.image_tower import Teacher, describe_tower
from modeling.layers import fingerprint
from modeling.losses import (
    DualLossConfig,
    ReconstructionLossConfig,
    contrastive_loss,
    kl_loss,
    loss_weights,
    posterior_statistics,
    reconstruction_losses,
    semantic_loss,
    weighted_terms,
)
from modeling.perceptual import PerceptualConfig, PerceptualLoss
from modeling.text_encoder import TextEncoder, TextEncoderConfig, load_text_encoder
from modeling.vision_teacher import VisionConfig, VisionTeacher
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import load_any_tokenizer
from training.loop import Evaluation, train
from training.optim import OptimizedNetwork, OptimizerConfig, descend
from training.pictures import SheetConfig, caption_grid, pair_rows, sample_path, save_png
from training.provenance import check_shards, save_source
from training.run import Run, save_config, start_run
from training.stage import TrainedStage, open_stream
from training.tokens import text_states, unit_images


@dataclass
class TokenizerStage(TrainedStage):
    """What can be set in tokenizer.yaml, besides the parts' own fields."""

    # The text tower of the whole experiment: all later stages take it from this run.
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    # A dual tokenizer in its place: discrete codes, to draw and to understand
    dual: DualTokenizerConfig | None = None
    activation_checkpointing: ActivationCheckpointing = "none"
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    # A stage-1 run of any size to start from: what does not fit starts afresh and is listed.
    init_from: str = ""
    freeze_encoder: bool = False  # train the decoder only: the latents stay what they are
    # Of a dual tokenizer: the semantic encoder stays the teacher, but for its head
    freeze_tower: bool = False
    losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    dual_losses: DualLossConfig = field(default_factory=DualLossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pictures: SheetConfig = field(default_factory=SheetConfig)
    evaluation: ReconstructionEvaluationConfig = field(
        default_factory=ReconstructionEvaluationConfig
    )

    stage = "tokenizer"
    networks = ("tokenizer", "dual")

    def check(self) -> None:
        super().check()
        start, end = self.adversarial.start_step, self.training.max_steps
        if self.adversarial.weight and start >= end:
            raise ValueError(
                f"adversarial.start_step={start} is not before training.max_steps={end}: lower it, "
                "or turn the adversarial loss off by adversarial.weight=0"
            )
        if self.evaluation.every_steps and not (self.evaluation.shards or self.pictures.shards):
            raise ValueError("evaluation.every_steps needs images: set evaluation.shards")
        if self.freeze_encoder and not self.init_from:
            raise ValueError("freeze_encoder=true needs a trained encoder: set init_from")

        # One tokenizer of two kinds, and the losses that each of them has.
        if self.dual:
            if self.tokenizer != ImageTokenizerConfig():
                raise ValueError("tokenizer and dual are both set: a run has one tokenizer")
            if self.losses.vision_weight or self.losses.contrast_weight:
                raise ValueError(
                    "losses.vision_weight and contrast_weight are not for a dual tokenizer"
                )
            return
        if self.freeze_tower or self.dual_losses != DualLossConfig():
            raise ValueError("freeze_tower and dual_losses are for a dual tokenizer: set dual")
        for name in ("kl_weight", "vision_weight", "contrast_weight"):
            weight = getattr(self.losses, name)
            if self.freeze_encoder and weight:
                raise ValueError(
                    f"losses.{name}={weight} with freeze_encoder=true teaches nothing: set "
                    f"losses.{name}=0"
                )

    @property
    def image_size(self) -> int:
        """Of the tokenizer's images, in pixels."""
        return (self.dual or self.tokenizer).image_size

    def image_shards(self) -> list[str]:
        return self.data.all_shards() + self.pictures.shards


class Parts(NamedTuple):
    """What the steps, pictures and evaluations of the stage share."""

    run: Run
    text_encoder: TextEncoder
    perceptual: PerceptualLoss | None
    teacher: Teacher | VisionTeacher | None = None


def main(config: TokenizerStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    text_encoder = load_text_encoder(config.text_encoder).to(run.device)
    # Sizes that tower and teacher know are read from them, never typed; the saved config then
    # rebuilds the network without either.
    if config.dual:
        config.dual = replace(config.dual, tower=describe_tower(config.dual.teacher))
    else:
        sizes = config.tokenizer.for_text(text_encoder.shape, text_encoder.masks_padding)
        config.tokenizer = replace(sizes, contrasts_text=config.losses.contrast_weight > 0)
    # Fingerprints in each checkpoint: with another tower the latents would mean something else.
    inputs = {"text_encoder": text_encoder.identity}
    teacher = build_teacher(config, run)
    if config.losses.vision_weight:
        config.tokenizer = replace(config.tokenizer, vision_width=teacher.width)
        inputs["vision"] = fingerprint(teacher)
    dual_teacher = fingerprint(teacher) if config.dual and teacher else ""
    shards = check_shards(run, config.data, training.max_steps, dual_teacher)
    # A complete run ends here: it needs neither images nor weights files.
    if is_complete(run, config, inputs):
        return

    # Data, and all that a picture or an evaluation will read.
    evaluation = build_evaluation(config, text_encoder)
    has_checkpoint = latest_checkpoint(run.folder) is not None
    perceptual = None
    if config.losses.perceptual_weight:
        # One process a machine downloads what is absent, and the others find it.
        with run.accelerator.local_main_process_first():
            perceptual = PerceptualLoss(config.perceptual).to(run.device)
    parts = Parts(run, text_encoder, perceptual, teacher)
    # Absent files stop the run now, not at a picture.
    expand_shards(config.image_shards())
    reader = image_reader(config.data, config.image_size, text_encoder.tokenize)
    loader = open_stream(run, training, reader)
    sheet = config.pictures.read(reader)

    # Tokenizer and discriminator.
    model = build_model(config, run, has_checkpoint, teacher)
    save_config(run, config, has_checkpoint)
    save_source(run.folder, shards)
    clip = training.max_gradient_norm
    networks = {"": OptimizedNetwork(run, model, config.optimizer, clip)}
    if config.adversarial.weight:
        optimizer = config.discriminator_optimizer
        networks["discriminator_"] = OptimizedNetwork(run, Discriminator(), optimizer, clip)
    train(
        run=run,
        stage=config,
        networks=networks,
        step_fn=partial(train_step, config, parts, networks),
        loader=loader,
        inputs=inputs,
        save_samples=partial(save_reconstructions, parts, sheet),
        evaluation=evaluation,
    )


def train_step(
    config: TokenizerStage,
    parts: Parts,
    networks: dict[str, OptimizedNetwork],
    batches: Sequence[dict],
    index: int,
) -> dict[str, Tensor]:
    """Generator update, then from adversarial.start_step on discriminator update.

    index: of the step, from 0. Returns the mean terms of both, those of the discriminator as
    "discriminator/NAME".
    """
    start, max_steps = config.adversarial.start_step, config.training.max_steps
    is_adversarial = config.adversarial.weight > 0 and index >= start
    discriminator = networks["discriminator_"].module if is_adversarial else None
    pairs = []  # of images and reconstructions, for the discriminator

    def generator_losses(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        images = unit_images(parts.run, batch)
        if config.dual:
            quantizer = networks[""].module.quantizer
            reconstructions, own = dual_pass(parts, model, quantizer, images)
        else:
            reconstructions, own = vae_pass(parts, model, images, batch)
        # The discriminator's turn comes later, on these very pictures, without the generator's
        # graph.
        if is_adversarial:
            pairs.append((images, reconstructions.detach()))
        return generator_terms(config, parts, discriminator, images, reconstructions, own)

    means = descend(networks[""], batches, generator_losses, index, max_steps)
    if not is_adversarial:
        return means

    # Discriminator: the same images and reconstructions; its schedule begins at start_step.
    def discriminator_losses(model: nn.Module, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        real, fake = model(torch.cat(pair)).chunk(2)
        hinge = discriminator_loss(real, fake)
        lecam = discriminator.lecam.penalty(real, fake)
        loss = hinge + config.adversarial.lecam_weight * lecam
        logits = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        return {"hinge": hinge, "lecam": lecam, "loss": loss} | logits

    learner = networks["discriminator_"]
    learned = descend(learner, pairs, discriminator_losses, index - start, max_steps - start)

    # LeCam's averages follow the logits of the whole step.
    discriminator.lecam.update(learned["real"], learned["fake"])
    return means | {f"discriminator/{name}": value for name, value in learned.items()}


def vae_pass(
    parts: Parts, model: nn.Module, images: Tensor, batch: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """(reconstructions B x 3 x R x R, KL and how the latents are used) of an ImageTokenizer."""
    output = model(images, text_states(parts.run, parts.text_encoder, batch))
    terms = {"kl": kl_loss(output.mean, output.logvar)}
    if output.vision is not None:
        with parts.run.accelerator.autocast():
            terms["vision"] = semantic_loss(output.vision, parts.teacher(images))
    if output.contrast is not None:
        terms["contrast"] = contrastive_loss(*output.contrast)
    return output.reconstructions, terms | posterior_statistics(output.mean, output.logvar)


def dual_pass(
    parts: Parts, model: nn.Module, quantizer: DualQuantizer, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(reconstructions B x 3 x R x R, losses and usage of the codes) of a DualTokenizer."""
    reconstructions, features, quantised = model(images)
    terms = quantizer.count(quantised.indices)
    # Without a teacher only the pixel decoder learns: the codes stay what they are.
    if parts.teacher is None:
        return reconstructions, terms
    with parts.run.accelerator.autocast():
        targets = parts.teacher(images)
    semantic = semantic_loss(features, targets)
    terms |= {"semantic": semantic, "cosine_to_teacher": 1 - semantic}
    terms |= {"codebook": quantised.codebook, "commitment": quantised.commitment}
    return reconstructions, terms


def generator_terms(
    config: TokenizerStage,
    parts: Parts,
    discriminator: Discriminator | None,
    images: Tensor,
    reconstructions: Tensor,
    own: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Terms of one batch, raw and weighted, and their sum "loss".

    Args:
        images, reconstructions: B x 3 x R x R, images in [0, 1].
        own: what only this kind of tokenizer has.
    """
    # TA-TiTok's losses, as in its public recipe (paper, Sec. 4.1).
    terms = own | reconstruction_losses(images, reconstructions)
    if parts.perceptual is not None:
        terms |= parts.perceptual(reconstructions, images)

    # The discriminator only passes the gradient on; its own update comes after this one.
    if discriminator is not None:
        discriminator.requires_grad_(False)
        with parts.run.accelerator.autocast():
            terms["adversarial"] = generator_loss(discriminator(reconstructions))
        discriminator.requires_grad_(True)

    # Raw and weighted terms are both logged: the weighted ones show which loss dominates.
    weights = loss_weights(config.losses) | loss_weights(config.dual_losses)
    weights["adversarial"] = config.adversarial.weight
    weighted = weighted_terms(terms, weights)
    terms |= {f"weighted/{name}": term for name, term in weighted.items()}
    return terms | {"loss": sum(weighted.values())}


def build_evaluation(config: TokenizerStage, text_encoder: TextEncoder) -> Evaluation | None:
    """What is measured on the way, None if nothing is; ValueError if its images are absent."""
    if not config.evaluation.every_steps:
        return None
    entries = list_images(config.evaluation.shards or config.pictures.shards)
    entries = entries[: config.evaluation.num_images or None]
    keys, background = tuple(config.data.captions.keys), tuple(config.data.background)
    images = ImageSet(entries, config.image_size, keys, background)
    measure = ReconstructionEvaluation(images, text_encoder, config.training.precision == "bf16")
    return Evaluation(config.evaluation.every_steps, measure)


def build_teacher(config: TokenizerStage, run: Run) -> Teacher | VisionTeacher | None:
    """What the encoders learn from besides the images; a decoder alone needs none."""
    if config.freeze_encoder or not (config.dual or config.losses.vision_weight):
        return None
    # One process a machine downloads, and the others find the file.
    with run.accelerator.local_main_process_first():
        if config.dual:
            return Teacher(config.dual.teacher).to(run.device)
        return VisionTeacher(config.vision, config.tokenizer.grid_size).to(run.device)


def build_model(
    config: TokenizerStage,
    run: Run,
    has_checkpoint: bool,
    teacher: Teacher | VisionTeacher | None = None,
) -> ImageTokenizer | DualTokenizer:
    """The tokenizer, from `init_from` as far as that fits; a resumed run loads its own weights."""
    model = DualTokenizer(config.dual) if config.dual else ImageTokenizer(config.tokenizer)
    if config.dual and teacher:
        model.start_from(teacher)
    if config.init_from and not has_checkpoint:
        load_what_fits(model, config.init_from, run)
    set_activation_checkpointing(model, config.activation_checkpointing)
    # Frozen last: what was loaded above is what stays.
    if config.freeze_tower:
        model.semantic_encoder.requires_grad_(False)
    if config.freeze_encoder:
        model.freeze_encoder()
    return model


def load_what_fits(model: ImageTokenizer | DualTokenizer, run_dir: str, run: Run) -> None:
    """Take the tensors of another tokenizer that have the same name and shape; list the others."""
    # RoPE has no weights, and the learned positions belong to latent and text tokens: both fit any
    # resolution.
    source = load_any_tokenizer(run_dir).state_dict()
    own = model.state_dict()
    there = {name: tuple(tensor.shape) for name, tensor in source.items()}
    here = {name: tuple(tensor.shape) for name, tensor in own.items()}
    fitting = {name: source[name] for name, shape in there.items() if here.get(name) == shape}
    if not fitting:
        raise ValueError(
            f"init_from={run_dir}: none of its {len(source)} tensors fits the configured tokenizer"
        )
    model.load_state_dict(fitting, strict=False)

    # What was not taken is listed, or a typing error in a size would train from random weights.
    run.say(f"{len(fitting)} of {len(own)} tensors come from {run_dir}")
    for name in sorted((here.keys() | there.keys()) - fitting.keys()):
        run.say(f"  not taken: {name}: here {here.get(name)}, there {there.get(name)}")


@torch.no_grad()
def save_reconstructions(
    parts: Parts, batch: dict, model: ImageTokenizer | DualTokenizer, step: int
) -> None:
    """Grid of a batch: originals left, EMA reconstructions of the posterior's mean right."""
    images = unit_images(parts.run, batch)
    states = text_states(parts.run, parts.text_encoder, batch)
    reconstructions = model.decode(model.encode(images).mean, states)
    sheet = caption_grid(pair_rows(images, reconstructions), batch["caption"], columns=4)
    save_png(sheet, sample_path(parts.run.folder, step))


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TokenizerStage, __doc__)))
