"""Train a small CLIP on the experiment's own pairs, for machines without a pretrained one.

    accelerate launch --module scripts.train_text_encoder --config configs/emoji/text_encoder.yaml

Out: RUN/clip/, which the other stages read with `text_encoder.model: local-dir:RUN/clip`. Where
OpenAI's ViT-L/14-336 can be had, use that instead (configs/flowtok_*). The same command resumes,
and does nothing when the run is complete.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import parse_stage_args
from data.images import ImageTextConfig, image_reader
from modeling.clip_weights import build_clip, save_clip
from modeling.losses import contrastive_loss
from modeling.text_decoder import CLIP_VOCABULARY
from modeling.text_encoder import ClipTokenizer
from training.checkpoint import is_complete, latest_checkpoint
from training.errors import exit_on_error
from training.loading import load_ema
from training.loop import train_network
from training.provenance import check_shards, save_source
from training.run import Run, save_config, start_run
from training.stage import TrainedStage, open_stream
from training.tokens import unit_images

MAX_SHIFT = 4  # pixels; random shift of the images
MAX_LOG_SCALE = 4.6  # of the contrastive logits, log(100) as in CLIP
CLIP_EMBEDDING_STD = 0.02


@dataclass
class ClipSize:
    """Sizes of the CLIP; both towers have the same width and depth."""

    image_size: int = 64  # pixels
    patch_size: int = 16  # pixels
    context_length: int = 77  # L, and with it the number of tokens of the whole experiment
    embed_dim: int = 256
    width: int = 192
    depth: int = 4
    num_heads: int = 6  # of the text tower; the image tower's heads are 64 wide
    # Initial deviation of the token embeddings, twice that of their positions; CLIP's. A larger one
    # keeps the words apart in a tower that hardly learns (docs/recipe.md).
    embedding_std: float = CLIP_EMBEDDING_STD
    # What stands for the image: CLIP's class token, or the patches' mean, as codes can tell it
    image_pool: Literal["class_token", "mean"] = "class_token"


@dataclass
class TextEncoderStage(TrainedStage):
    """What can be set in text_encoder.yaml, besides the parts' own fields."""

    clip: ClipSize = field(default_factory=ClipSize)
    data: ImageTextConfig = field(default_factory=ImageTextConfig)

    stage = "text_encoder"
    networks = ("clip",)

    def image_shards(self) -> list[str]:
        return self.data.all_shards()


def main(config: TextEncoderStage) -> None:
    """Run the stage from start or checkpoint to its last step, then write the CLIP folder."""
    training = config.training
    run = start_run(config.run_dir, training.precision, training.seed, training.timeout_minutes)
    shards = check_shards(run, config.data, training.max_steps)

    # The contrastive training, image to caption and caption to image.
    if not is_complete(run, config, inputs={}):
        tokenize = ClipTokenizer(config.clip.context_length)
        reader = image_reader(config.data, config.clip.image_size, tokenize)
        loader = open_stream(run, training, reader)
        save_config(run, config, latest_checkpoint(run.folder) is not None)
        save_source(run.folder, shards)
        train_network(
            run=run,
            stage=config,
            module=new_pair(config.clip),
            loss_fn=partial(compute_losses, run),
            loader=loader,
            inputs={},
        )

    # The main process alone looks at the folder, too: it is moved while the others would.
    if run.is_main:
        write_clip(config, run)
    run.accelerator.wait_for_everyone()


def write_clip(config: TextEncoderStage, run: Run) -> None:
    """Write the EMA weights as an open_clip folder, unless it is newer than they are."""
    # Another stage may be reading the folder of a complete run.
    folder = run.folder / "clip"
    _, newest = latest_checkpoint(run.folder)
    if folder.is_dir() and folder.stat().st_mtime >= newest.stat().st_mtime:
        return
    clip_config = open_clip_config(config.clip)
    pair = load_ema(ClipPair(clip_config), run.folder)
    save_clip(pair.clip, clip_config, folder)
    run.say(f"text encoder written to {folder}")


def open_clip_config(size: ClipSize) -> dict:
    """open_clip's model config for our sizes."""
    vision = {
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "width": size.width,
        "layers": size.depth,
    }
    if size.image_pool == "mean":
        # open_clip's default is the class token, which it calls tok.
        vision["pool_type"] = "avg"
    text = {
        "context_length": size.context_length,
        "vocab_size": CLIP_VOCABULARY,
        "width": size.width,
        "heads": size.num_heads,
        "layers": size.depth,
    }
    return {"embed_dim": size.embed_dim, "vision_cfg": vision, "text_cfg": text}


class ClipPair(nn.Module):
    """An open_clip model as one call, so that DDP sees every weight."""

    def __init__(self, clip_config: dict):
        super().__init__()
        self.clip = build_clip(clip_config)

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images B x 3 x R x R in [0, 1], ids B x L -> features B x E each, log temperature."""
        image_features = self.clip.encode_image(images * 2 - 1)
        return image_features, self.clip.encode_text(token_ids), self.clip.logit_scale


@torch.no_grad()
def new_pair(size: ClipSize) -> ClipPair:
    """A CLIP with new weights."""
    pair = ClipPair(open_clip_config(size))
    # Relative to open_clip's own initialisation, which draws the same numbers at any scale.
    scale = size.embedding_std / CLIP_EMBEDDING_STD
    for embedding in (pair.clip.token_embedding.weight, pair.clip.positional_embedding):
        embedding.mul_(scale)
    return pair


def random_shift(images: Tensor) -> Tensor:
    """Shift a batch by up to MAX_SHIFT pixels each way; what comes in at the border repeats it."""
    dy, dx = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    size = images.shape[-1]
    return F.pad(images, [MAX_SHIFT] * 4, mode="replicate")[..., dy : dy + size, dx : dx + size]


def compute_losses(run: Run, model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """Contrastive loss, and the share of captions whose own image is the batch's nearest."""
    # Beside the reader's own crops and flips: a small set is learned by heart otherwise.
    images = unit_images(run, batch)
    token_ids = batch["token_ids"].to(run.device, non_blocking=True)
    image_features, text_features, log_scale = model(random_shift(images), token_ids)
    with torch.no_grad():
        nearest = (F.normalize(text_features) @ F.normalize(image_features).T).argmax(dim=1)
        accuracy = (nearest == torch.arange(len(nearest), device=run.device)).float().mean()
    # CLIP's own limit: without it the logits grow until the loss is unstable.
    log_scale = log_scale.clamp(max=MAX_LOG_SCALE)
    return {"loss": contrastive_loss(text_features, image_features, log_scale), "top1": accuracy}


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TextEncoderStage, __doc__)))
