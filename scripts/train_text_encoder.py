"""Train a small CLIP from scratch on the experiment's own pairs, for machines that can't have a pretrained one.

    accelerate launch --module scripts.train_text_encoder --config configs/demo/text_encoder.yaml [key=value ...]

Out: RUN/clip/, which the other stages read with `text_encoder.model: local-dir:RUN/clip`. Where OpenAI's ViT-L/14-336
can be had, use that instead (configs/flowtok_*). The same command resumes, and does nothing when the run is complete.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.load import default_values, exit_on_error, parse_stage_args, resolved
from configs.schema import ClipSizeConfig, TextEncoderStage
from data.readers import image_reader
from modeling.losses import contrastive_loss
from modeling.text_encoder import build_clip, clip_tokenizer, save_clip
from training.checkpoint import latest_checkpoint
from training.loading import load_ema
from training.loop import Trainer, batch_per_pass, is_complete
from training.run import Run, save_config, start_run

MAX_SHIFT = 4  # pixels; random shift of the images


def main(config: TextEncoderStage) -> None:
    """Run the stage from start or checkpoint to its last step, then write the CLIP folder."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    clip_config = open_clip_config(config.clip)
    folder = run.folder / "clip"
    if not is_complete(run, config.training):
        train(config, run, clip_config)
    newest = latest_checkpoint(run.folder)[1]
    if run.is_main and not (folder.is_dir() and folder.stat().st_mtime >= newest.stat().st_mtime):
        save_clip(load_ema(ClipPair(clip_config), run.folder).clip, clip_config, folder)
        run.say(f"text encoder written to {folder}")
    run.accelerator.wait_for_everyone()


def open_clip_config(size: ClipSizeConfig) -> dict:
    """open_clip's model config for our sizes."""
    vision = {
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "width": size.vision_width,
        "layers": size.vision_layers,
    }
    text = {
        "context_length": size.context_length,
        "vocab_size": 49408,
        "width": size.text_width,
        "heads": size.text_heads,
        "layers": size.text_layers,
    }
    return {"embed_dim": size.embed_dim, "vision_cfg": vision, "text_cfg": text}


class ClipPair(nn.Module):
    """An open_clip model whose forward gives image features, text features and the log temperature."""

    def __init__(self, clip_config: dict):
        super().__init__()
        self.clip = build_clip(clip_config)

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images B x 3 x R x R in [0, 1], ids B x L -> B x E, B x E, scalar."""
        return (
            self.clip.encode_image(images * 2 - 1),
            self.clip.encode_text(token_ids),
            self.clip.logit_scale,
        )


def train(config: TextEncoderStage, run: Run, clip_config: dict) -> None:
    """The contrastive training of CLIP."""
    tokenize = clip_tokenizer(config.clip.context_length)
    loader = image_reader(config.data, config.clip.image_size, tokenize).stream(
        batch_per_pass(run, config.training),
        config.training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        pin_memory=run.device.type == "cuda",
    )
    save_config(
        run,
        resolved(config),
        default_values(config),
        ["clip"],
        latest_checkpoint(run.folder) is not None,
    )
    trainer = Trainer(run, config.training, config.optimizer, ClipPair(clip_config), loader)
    trainer.train(partial(compute_losses, run), config.logging, lambda model, step: None)


def random_shift(images: Tensor) -> Tensor:
    """Shift a batch by up to MAX_SHIFT pixels each way; what comes in at the border repeats it."""
    dy, dx = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    size = images.shape[-1]
    return F.pad(images, [MAX_SHIFT] * 4, mode="replicate")[..., dy : dy + size, dx : dx + size]


def compute_losses(run: Run, model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """Symmetric contrastive loss, and the share of captions whose own image is the nearest of the batch's."""
    images = random_shift(batch["image"].to(run.device, non_blocking=True).float().div_(255))
    image_features, text_features, log_scale = model(
        images, batch["token_ids"].to(run.device, non_blocking=True)
    )
    with torch.no_grad():
        nearest = (F.normalize(text_features) @ F.normalize(image_features).T).argmax(dim=1)
        accuracy = (nearest == torch.arange(len(nearest), device=run.device)).float().mean()
    return {
        "loss": contrastive_loss(text_features, image_features, log_scale.clamp(max=4.6)),
        "top1": accuracy,
    }


if __name__ == "__main__":
    stage = parse_stage_args("text_encoder", __doc__)
    exit_on_error(lambda: main(stage))
