"""Stage 1: train the image tokenizer (TA-TiTok with RoPE and SwiGLU, as a VAE; paper, Sec. 3.2).

    accelerate launch train_tokenizer.py --config configs/demo/tokenizer.yaml [key=value ...]
    python train_tokenizer.py --config configs/demo/tokenizer.yaml training.max_steps=100      (one process)

In: image shards with captions. Out: a run folder; its EMA weights encode images to K x C tokens and decode them.
Losses: pixels, perceptual (modeling/perceptual.py), adversarial from a step on (modeling/adversarial.py), KL; each is
off by weight 0. Watch channels_in_use and posterior_std/*: a posterior collapse shows there first.
The same command resumes, and does nothing when the run is complete.
"""

from functools import partial

import torch
from torch import Tensor, nn

from configs.load import default_values, exit_on_error, parse_stage_args, resolved
from configs.schema import TokenizerStage
from data.readers import image_reader
from data.tar import expand_shards
from eval.during_training import ReconstructionEvaluation
from eval.images import ImageSet, list_images
from modeling.adversarial import Adversary, generator_loss, hinge_discriminator_loss, is_active
from modeling.image_tokenizer import ImageTokenizer
from modeling.losses import (
    kl_loss,
    posterior_statistics,
    reconstruction_losses,
    reconstruction_weights,
    weighted_sum,
)
from modeling.perceptual import PerceptualLoss
from modeling.text_encoder import TextEncoder, TextTokenizer, load_text_encoder
from training.checkpoint import latest_checkpoint
from training.loading import fingerprint, load_tokenizer
from training.loop import Evaluation, Trainer, batch_per_pass, is_complete
from training.pictures import caption_grid, pair_rows, sample_path, save_png
from training.player import Opponent, Player
from training.run import Run, save_config, start_run


def main(config: TokenizerStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    guided = config.tokenizer.text_guidance
    tokenize = TextTokenizer(config.text_encoder) if guided else None
    text_encoder = load_text_encoder(config.text_encoder).to(run.device) if guided else None
    if guided:
        check_text_shape(config, text_encoder)
    inputs = {"text_encoder": fingerprint(text_encoder)} if guided else {}
    if is_complete(run, config.training, inputs):
        return
    evaluation = build_evaluation(config, text_encoder, tokenize)
    started = latest_checkpoint(run.folder) is not None
    perceptual = build_perceptual(config, run)
    expand_shards(picture_shards(config) or config.data.all_shards())
    reader = image_reader(config.data, config.tokenizer.image_size, tokenize)
    loader = reader.stream(
        batch_per_pass(run, config.training),
        config.training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        pin_memory=run.device.type == "cuda",
    )
    model = build_model(config, run, started)
    save_config(run, resolved(config), default_values(config), ["tokenizer"], started)
    losses = TokenizerLosses(config, run, text_encoder, perceptual)
    trainer = Trainer(
        run, config.training, config.optimizer, model, loader, inputs, losses.opponent
    )
    save_pictures = partial(save_reconstructions, config, run, text_encoder, tokenize)
    trainer.train(
        lambda model, batch: losses(model, batch, trainer.step),
        config.logging,
        save_pictures,
        evaluation,
    )


def build_evaluation(
    config: TokenizerStage, text_encoder: TextEncoder | None, tokenize: TextTokenizer | None
) -> Evaluation | None:
    """What is measured on the way, with its images listed; None if nothing is.

    Raises:
        ValueError: no such images.
    """
    part, data = config.evaluation, config.data
    if not part.every_steps:
        return None
    entries = list_images(part.shards or config.pictures.shards)[: part.num_images or None]
    images = ImageSet(
        entries, config.tokenizer.image_size, tuple(data.captions.keys), tuple(data.background)
    )
    bf16 = config.training.precision == "bf16"
    return Evaluation(
        part.every_steps, ReconstructionEvaluation(part, images, text_encoder, tokenize, bf16)
    )


def build_perceptual(config: TokenizerStage, run: Run) -> PerceptualLoss | None:
    """The perceptual loss, if it has a weight; one process a machine downloads what is absent."""
    if not config.losses.perceptual_weight:
        return None
    with run.accelerator.local_main_process_first():
        return PerceptualLoss(config.perceptual).to(run.device)


def build_model(config: TokenizerStage, run: Run, started: bool) -> ImageTokenizer:
    """The tokenizer, from `init_from` as far as that fits; a resumed run loads its own weights later."""
    model = ImageTokenizer(config.tokenizer)
    if config.init_from and not started:
        load_what_fits(model, config.init_from, run)
    model.set_recompute(config.activation_checkpointing)
    model.encoder.requires_grad_(not config.freeze_encoder)
    return model


def load_what_fits(model: ImageTokenizer, run_dir: str, run: Run) -> None:
    """Take over the tensors of another tokenizer that have the same name and shape; the others are listed.

    RoPE has no weights: its angles follow the image's grid. The learned positions belong to latent and text tokens, so
    that they fit any resolution.

    Raises:
        ValueError: nothing fits.
    """
    source, own = load_tokenizer(run_dir)[0].state_dict(), model.state_dict()
    fitting = {
        name: tensor
        for name, tensor in source.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise ValueError(
            f"init_from={run_dir}: none of its {len(source)} tensors fits the configured tokenizer"
        )
    model.load_state_dict(fitting, strict=False)
    run.say(f"{len(fitting)} of {len(own)} tensors come from {run_dir}")
    for name in sorted(own.keys() - fitting.keys()):
        other = f"there {tuple(source[name].shape)}" if name in source else "not there"
        run.say(f"  starts afresh: {name} {tuple(own[name].shape)}, {other}")
    for name in sorted(source.keys() - own.keys()):
        run.say(f"  left behind: {name} {tuple(source[name].shape)}")


def picture_shards(config: TokenizerStage) -> list[str] | None:
    """Shards whose first images are reconstructed in the pictures; None: those of the training data."""
    return config.pictures.shards or None


def check_text_shape(config: TokenizerStage, text_encoder: TextEncoder) -> None:
    """Refuse a decoder built for other text states than the tower gives."""
    expected = (text_encoder.context_length, text_encoder.width)
    if (config.tokenizer.text_tokens, config.tokenizer.text_width) != expected:
        raise ValueError(
            f"tokenizer.text_tokens x text_width = {config.tokenizer.text_tokens} x {config.tokenizer.text_width}, but "
            f"{config.text_encoder.model} gives {expected[0]} x {expected[1]}"
        )


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images of a batch -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def encode_text(run: Run, text_encoder: TextEncoder | None, batch: dict) -> Tensor | None:
    """Text states of a batch in the run's precision, or None without guidance."""
    if text_encoder is None:
        return None
    with run.accelerator.autocast():
        return text_encoder(batch["token_ids"].to(run.device, non_blocking=True))


class TokenizerLosses:
    """The loss terms of the tokenizer, and of the discriminator on what the tokenizer just made.

    `opponent` is the discriminator's part in training, or None without an adversarial loss.
    """

    def __init__(
        self,
        config: TokenizerStage,
        run: Run,
        text_encoder: TextEncoder | None,
        perceptual: PerceptualLoss | None,
    ):
        self.config, self.run, self.text_encoder, self.perceptual = (
            config,
            run,
            text_encoder,
            perceptual,
        )
        self.opponent, self._images, self._logit_means = None, None, []
        if config.adversarial.weight:
            self.adversary = Adversary(config.discriminator, config.adversarial.lecam_decay)
            player = Player(run, self.adversary, config.discriminator_optimizer)
            start = config.adversarial.start_step
            self.opponent = Opponent(player, self.discriminator_terms, self.move_averages, start)

    def __call__(self, model: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
        """Terms of one batch at a step (counted from 0), raw and weighted, and how the latents are used."""
        config, images = self.config, to_unit(batch["image"], self.run.device)
        reconstructions, mean, logvar = model(
            images, encode_text(self.run, self.text_encoder, batch)
        )
        terms, weights = (
            reconstruction_losses(images, reconstructions),
            reconstruction_weights(config.losses),
        )
        terms["kl"] = kl_loss(mean, logvar)
        if self.perceptual is not None:
            terms |= self.perceptual(reconstructions, images)
        if is_active(config.adversarial, step):
            self._images = images, reconstructions.detach()
            terms["adversarial"], weights["adversarial"] = (
                self.deceive(reconstructions),
                config.adversarial.weight,
            )
        return weighted_sum(terms, weights) | posterior_statistics(mean, logvar)

    def deceive(self, reconstructions: Tensor) -> Tensor:
        """Generator loss through a discriminator that gets no gradient."""
        self.adversary.requires_grad_(False)
        with self.run.accelerator.autocast():
            loss = generator_loss(self.adversary.discriminator(reconstructions))
        self.adversary.requires_grad_(True)
        return loss

    def discriminator_terms(self, wrapped: nn.Module) -> dict[str, Tensor]:
        """Terms of the discriminator on the last batch and its detached reconstructions."""
        real, fake = wrapped(*self._images)
        terms = {
            "hinge": hinge_discriminator_loss(real, fake),
            "lecam": self.adversary.lecam.penalty(real, fake),
        }
        terms["loss"] = terms["hinge"] + self.config.adversarial.lecam_weight * terms["lecam"]
        means = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        self._logit_means.append(torch.stack([*means.values()]))
        return terms | means

    def move_averages(self) -> None:
        """Let LeCam's averages follow the step's logits."""
        self.adversary.lecam.update(*torch.stack(self._logit_means).mean(dim=0))
        self._logit_means.clear()


@torch.no_grad()
def save_reconstructions(
    config: TokenizerStage,
    run: Run,
    text_encoder: TextEncoder | None,
    tokenize: TextTokenizer | None,
    model,
    step: int,
) -> None:
    """Picture: originals left, EMA reconstructions (posterior mean) right."""
    number = config.pictures.num_samples
    size, shards = config.tokenizer.image_size, picture_shards(config)
    batch = next(image_reader(config.data, size, tokenize).once(number, shards, limit=number))
    images = to_unit(batch["image"], run.device)
    reconstructions = model.decode(model.encode(images).mean, encode_text(run, text_encoder, batch))
    sheet = caption_grid(pair_rows(images, reconstructions), batch["caption"], columns=4)
    save_png(sheet, sample_path(run.folder, step))


if __name__ == "__main__":
    stage = parse_stage_args("tokenizer", __doc__)
    exit_on_error(lambda: main(stage))
