"""Stage 1: train the image tokenizer (TA-TiTok with RoPE and SwiGLU, as a VAE; paper, Sec. 3.2).

    accelerate launch train_tokenizer.py --config configs/demo/tokenizer.yaml [key=value ...]
    python train_tokenizer.py --config configs/demo/tokenizer.yaml training.max_steps=100      (one process)

In: image shards with captions. Out: a run folder; its EMA weights encode images to K x C tokens and decode them.
The same command resumes, and does nothing when the run is complete. Losses: modeling/losses.py, tokenizer_losses.
"""

from functools import partial

import torch
from torch import Tensor, nn

from configs.load import exit_on_error, parse_stage_args, resolved
from configs.schema import TokenizerStage
from data.image_text import build_image_loader, read_images
from data.tar import expand_shards
from eval.loading import fingerprint
from eval.pictures import caption_grid, pair_rows, sample_path, save_png
from modeling.image_tokenizer import ImageTokenizer
from modeling.losses import tokenizer_losses
from modeling.text_encoder import TextEncoder, TextTokenizer, load_text_encoder
from training.checkpoint import latest_checkpoint
from training.loop import Trainer, batch_per_pass, is_complete
from training.run import Run, save_config, start_run


def main(config: TokenizerStage) -> None:
    """Run the stage from start or checkpoint to its last step."""
    run = start_run(config.run_dir, config.training.precision, config.training.seed)
    guided = config.tokenizer.text_guidance
    tokenize = TextTokenizer(config.text_encoder) if guided else None
    text_encoder = load_text_encoder(config.text_encoder).to(run.device) if guided else None
    if guided:
        check_text_shape(config, text_encoder)
    inputs = {"text_encoder": fingerprint(text_encoder)} if guided else {}
    if is_complete(run, config.training, inputs):
        return
    expand_shards(picture_shards(config))
    loader = build_image_loader(
        config.data,
        config.tokenizer.image_size,
        tokenize,
        batch_per_pass(run, config.training),
        config.training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        pin_memory=run.device.type == "cuda",
    )
    model = ImageTokenizer(config.tokenizer)
    save_config(run, resolved(config), ["tokenizer"], latest_checkpoint(run.folder) is not None)
    trainer = Trainer(run, config.training, config.optimizer, model, loader, inputs)
    loss_fn = partial(compute_losses, config, run, text_encoder)
    trainer.train(loss_fn, config.logging, partial(save_reconstructions, config, run, text_encoder, tokenize))


def picture_shards(config: TokenizerStage) -> list[str]:
    """Shards whose first images are reconstructed in the pictures."""
    return config.pictures.shards or config.data.shards


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


def compute_losses(
    config: TokenizerStage, run: Run, text_encoder: TextEncoder | None, model: nn.Module, batch: dict
) -> dict[str, Tensor]:
    """Loss terms of one batch, and the deviation of the latents."""
    images = to_unit(batch["image"], run.device)
    reconstructions, mean, logvar = model(images, encode_text(run, text_encoder, batch))
    terms = tokenizer_losses(config.losses, images, reconstructions, mean, logvar)
    return terms | {"latent_std": mean.detach().std(), "posterior_std": (0.5 * logvar.detach()).exp().mean()}


@torch.no_grad()
def save_reconstructions(
    config: TokenizerStage, run: Run, text_encoder: TextEncoder | None, tokenize: TextTokenizer | None, model, step: int
) -> None:
    """Picture: originals left, EMA reconstructions (posterior mean) right."""
    number = config.pictures.num_samples
    size, shards = config.tokenizer.image_size, picture_shards(config)
    batch = next(read_images(config.data, size, tokenize, number, shards=shards, limit=number))
    images = to_unit(batch["image"], run.device)
    reconstructions = model.decode(model.encode(images).mean, encode_text(run, text_encoder, batch))
    sheet = caption_grid(pair_rows(images, reconstructions), batch["caption"], columns=4)
    save_png(sheet, sample_path(run.folder, step))


if __name__ == "__main__":
    stage = parse_stage_args("tokenizer", __doc__)
    exit_on_error(lambda: main(stage))
