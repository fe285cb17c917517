"""Image towers of open_clip: patch tokens of one that is trained on, or of a frozen teacher.

CLIP's ViT gives its patch tokens after the final LayerNorm; the teacher also projects them to the
space of the text features (TokenFlow). A tower of timm (SigLIP) gives the tokens before its last
block, without the final norm. Other grids than the tower's own: CLIP's positions are interpolated.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_weights import ClipWeights, build_image_tower, load_clip, model_config, preprocessing_of


@dataclass
class TeacherConfig(ClipWeights):
    """The CLIP whose image tower is distilled, and from which the semantic encoder starts."""

    key: ClassVar[str] = "dual.teacher"
    title: ClassVar[str] = "the teacher"


def describe_tower(config: ClipWeights) -> str:
    """What builds the image tower again without its weights, as JSON."""
    found = model_config(config)
    names = ("embed_dim", "vision_cfg", "quick_gelu")
    values = {name: found[name] for name in names if name in found}
    # The published tokenizers have SigLIP with GELU's tanh form, as transformers has it, not timm.
    if "siglip" in values["vision_cfg"].get("timm_model_name", ""):
        values["tanh_gelu"] = True
    return json.dumps(values, sort_keys=True)


class ImageTower(nn.Module):
    """Images B x 3 x R x R, normalised as wanted -> patch tokens B x G^2 x W, row by row."""

    def __init__(self, visual: nn.Module, tanh_gelu: bool = False):
        """tanh_gelu: of timm's blocks, in place of the exact form."""
        super().__init__()
        self.visual = visual
        self.is_clip = hasattr(visual, "class_embedding")
        if not self.is_clip and not hasattr(getattr(visual, "trunk", None), "blocks"):
            raise ValueError(f"{type(visual).__name__} is neither CLIP's ViT nor one of timm")
        if self.is_clip and visual.attn_pool is not None:
            raise ValueError("a tower with attentional pooling has no patch tokens of its own")
        if tanh_gelu:
            for block in visual.trunk.blocks:
                block.mlp.act = nn.GELU(approximate="tanh")
        # Channels of a token, W, and of what this tower's teacher gives, T
        if self.is_clip:
            self.width = visual.conv1.out_channels
            self.feature_channels = visual.output_dim
        else:
            self.width = self.feature_channels = visual.trunk.embed_dim
        # Patches along a side of the images that it was made for; pixels along a side of a patch
        patches = visual if self.is_clip else visual.trunk.patch_embed
        self.grid = patches.grid_size[0]
        self.patch_size = patches.patch_size[0]
        # Whether the image's feature is the mean of what its teacher gives for the patches
        averages = self.is_clip and visual.pool_type == "avg"
        self.pools_by_mean = averages and not visual.final_ln_after_pool

    @classmethod
    def build(cls, description: str) -> "ImageTower":
        """A tower with random weights, of `describe_tower`."""
        values = json.loads(description)
        tanh_gelu = values.pop("tanh_gelu", False)
        return cls(build_image_tower(values), tanh_gelu)

    def drop_unused(self) -> "ImageTower":
        """Drop CLIP's output projection, freeze what else gives no token."""
        # DDP would wait for the gradients of weights that no loss reaches.
        if self.is_clip:
            self.visual.proj = None
            return self
        self.visual.requires_grad_(False)
        trunk = self.visual.trunk
        for part in (trunk.patch_embed, trunk.pos_embed, *trunk.blocks[:-1]):
            part.requires_grad_(True)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_clip:
            trunk = self.visual.trunk
            # SigLIP's last block serves its pooling: its teacher's features are those before it.
            layer = len(trunk.blocks) - 2
            [tokens] = trunk.forward_intermediates(
                images, indices=[layer], stop_early=True, output_fmt="NLC", intermediates_only=True
            )
            return tokens
        visual = self.visual
        x = place_tokens(visual.conv1(images), visual.class_embedding, visual.positional_embedding)
        x = visual.transformer(visual.ln_pre(x))
        return visual.ln_post(x)[:, 1:]


def place_tokens(maps: Tensor, first: Tensor, positions: Tensor) -> Tensor:
    """Maps B x W x g x g -> tokens B x (1 + g^2) x W: `first`, W, before them; with positions."""
    first = first.to(maps.dtype).expand(len(maps), 1, -1)
    x = torch.cat([first, maps.flatten(2).transpose(1, 2)], dim=1)
    return x + resize_positions(positions, maps.shape[-1])


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions (1 + G^2) x W, the first of a class token -> the same for another grid."""
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    # The original's scale factor, on which the sampling points depend
    maps = positions[1:].T.unflatten(1, (old, old))[None]
    scale = (grid + 0.1) / old
    maps = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], maps[0].flatten(1).T])


class Teacher(nn.Module):
    """The frozen tower on images in [0, 1]: features B x G^2 x T, which are to be predicted."""

    def __init__(self, config: ClipWeights):
        super().__init__()
        clip = load_clip(config)
        description = json.loads(describe_tower(config))
        self.tower = ImageTower(clip.visual, description.get("tanh_gelu", False))
        preprocessing = preprocessing_of(config, clip)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name))
            self.register_buffer(name, values.view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tower((images - self.mean) / self.std)
        return tokens @ self.tower.visual.proj if self.tower.is_clip else tokens
