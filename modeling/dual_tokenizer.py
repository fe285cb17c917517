"""The dual tokenizer: images <-> indices of code pairs, each a semantic and a pixel code.

TokenFlow (CVPR 2025, arXiv 2412.03069): a semantic encoder (an image tower of open_clip, which
starts from the teacher) and a pixel encoder give maps on the same grid, which one quantiser codes.
From the semantic codes a small ViT predicts the teacher's features, from the pixel codes a decoder
the image. `encode` and `decode` serve where the ImageTokenizer's do: tokens are the codes,
B x G^2 x (S + P). Images are B x 3 x R x R in [0, 1], not clamped when decoded.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .dual_quantizer import DualQuantizer, Quantised, QuantizerConfig, resize
from .image_tokenizer import TransformerSize
from .image_tower import ImageTower, Teacher, TeacherConfig, place_tokens
from .layers import Attention, check_images, check_least, init_linear_
from .pixel_nets import (
    MAP_CHANNELS,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    ConvolutionSize,
    PatchDecoder,
    PatchEncoder,
)


@dataclass
class DualTokenizerConfig:
    """Sizes of the tokenizer; the defaults are the paper's B at 256 px."""

    image_size: int = 256  # pixels; a multiple of patch_size if pixel_nets are transformers
    patch_size: int = 16  # pixels a cell; that of the teacher's patches
    # Whose image tower is distilled, and starts the semantic encoder
    teacher: TeacherConfig = field(
        default_factory=lambda: TeacherConfig("ViT-B-16-quickgelu", "openai")
    )
    semantic_depth: int = 3  # blocks of the semantic decoder, as wide as the tower
    semantic_heads: int = 12  # of them
    # transformer: encoder and decoder below; convolutional: convolutions, the paper's
    pixel_nets: Literal["transformer", "convolutional"] = "convolutional"
    encoder: TransformerSize = field(default_factory=TransformerSize)
    decoder: TransformerSize = field(default_factory=TransformerSize)
    query_key_bias: float = 0.0  # of transformer: as tokenizer.query_key_bias
    convolutions: ConvolutionSize = field(default_factory=ConvolutionSize)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    # As describe_tower has it
    tower: str = field(default="", metadata={"derived": "the teacher"})

    def __post_init__(self):
        check_least(self, 0, "semantic_depth")
        check_least(self, 1, "image_size", "patch_size", "semantic_heads")
        if self.pixel_nets == "transformer" and self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.quantizer.scales[-1] != self.grid_size:
            raise ValueError(
                f"quantizer.scales end with {self.quantizer.scales[-1]}, expected image_size / "
                f"patch_size = {self.grid_size}"
            )

    @property
    def grid_size(self) -> int:
        """Cells along one side of the image, G."""
        return self.image_size // self.patch_size


class DualTokens(NamedTuple):
    """A coded image."""

    mean: Tensor  # B x G^2 x (S + P), sums of codes; named as a Posterior's
    indices: Tensor  # B x L, scale after scale, row-major


class DualTokenizer(nn.Module):
    """Encoders, quantiser and decoders. `forward` is the training pass."""

    def __init__(self, config: DualTokenizerConfig):
        super().__init__()
        self.config = config
        sizes, grid = config.quantizer, config.grid_size
        self.semantic_encoder = ImageTower.build(config.tower).drop_unused()
        check_grids(config, self.semantic_encoder)
        width = self.semantic_encoder.width
        self.to_semantic_codes = tanh_head(width, sizes.semantic_channels)
        self.net_size = config.image_size  # pixels along a side of the pixel nets' images
        if config.pixel_nets == "transformer":
            patch, channels = config.patch_size, sizes.pixel_channels
            self.pixel_encoder = PatchEncoder(config.encoder, grid, patch, channels)
            self.pixel_decoder = PatchDecoder(config.decoder, grid, patch, channels)
        else:
            # Their images are resized: 384 pixels at a stride of 16 are no grid of 27 cells.
            self.net_size = grid * config.convolutions.stride
            encoder = ConvolutionalEncoder(config.convolutions)
            decoder = ConvolutionalDecoder(config.convolutions)
            to_codes = nn.Conv2d(MAP_CHANNELS, sizes.pixel_channels, 1)
            from_codes = nn.Conv2d(sizes.pixel_channels, MAP_CHANNELS, 1)
            self.pixel_encoder = nn.Sequential(OrderedDict(net=encoder, to_codes=to_codes))
            self.pixel_decoder = nn.Sequential(OrderedDict(from_codes=from_codes, net=decoder))
        self.quantizer = DualQuantizer(sizes)
        self.semantic_decoder = SemanticDecoder(
            channels=sizes.semantic_channels,
            width=width,
            depth=config.semantic_depth,
            num_heads=config.semantic_heads,
            grid=self.semantic_encoder.grid,
        )
        self.to_features = tanh_head(width, self.semantic_encoder.feature_channels)
        self.init_weights()

    def maps(self, images: Tensor) -> Tensor:
        """Images B x 3 x R x R in [0, 1] -> what is to be coded, B x (S + P) x G x G."""
        check_images(images, self.config.image_size)
        # The semantic encoder, too, gets [-1, 1], whatever its tower was trained with.
        images = images * 2 - 1
        grid = self.config.grid_size
        tokens = self.to_semantic_codes(self.semantic_encoder(images))  # B x G^2 x S
        semantic = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        pixel = self.pixel_encoder(resize(images, self.net_size))
        return torch.cat([semantic, pixel.to(semantic.dtype)], dim=1)

    def draw(self, codes: Tensor) -> Tensor:
        """Codes B x (S + P) x G x G -> images B x 3 x R x R."""
        # The nets' images are in [-1, 1].
        pixels = self.pixel_decoder(codes[:, self.config.quantizer.semantic_channels :])
        return (resize(pixels, self.config.image_size) + 1) / 2

    def read(self, codes: Tensor) -> Tensor:
        """Codes B x (S + P) x G x G -> predicted features of the teacher, B x G^2 x T."""
        semantic = codes[:, : self.config.quantizer.semantic_channels]
        return self.to_features(self.semantic_decoder(semantic))

    def encode(self, images: Tensor) -> DualTokens:
        """Images B x 3 x R x R in [0, 1] -> codes and indices; in eval mode only."""
        assert not self.training, "a training pass may leave out a scale"
        quantised = self.quantizer(self.maps(images))
        codes = quantised.codes.flatten(2).transpose(1, 2)
        return DualTokens(codes, torch.cat(quantised.indices, dim=1))

    def decode(self, tokens: Tensor, text_states: Tensor | None = None) -> Tensor:
        """Codes B x G^2 x (S + P) -> images B x 3 x R x R, not clamped."""
        grid = self.config.grid_size
        return self.draw(tokens.transpose(1, 2).unflatten(2, (grid, grid)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Quantised]:
        """Training pass: (reconstructions, features of the teacher's as predicted, quantised)."""
        quantised = self.quantizer(self.maps(images))
        return self.draw(quantised.codes), self.read(quantised.codes), quantised

    def start_from(self, teacher: Teacher) -> None:
        """Take the teacher's weights into the semantic encoder."""
        # The teacher has more: the projection to the text's space, which gives its features.
        own, weights = self.semantic_encoder, teacher.tower.state_dict()
        own.load_state_dict({name: weights[name] for name in own.state_dict()})

    def freeze_encoder(self) -> None:
        """Freeze all but the pixel decoder: the codes stay what they are."""
        self.requires_grad_(False)
        self.pixel_decoder.requires_grad_(True)

    def init_weights(self) -> None:
        """Heads and semantic decoder normal 0.02; pixel transformers as the ImageTokenizer's."""
        for part in (self.to_semantic_codes, self.to_features):
            for module in part:
                init_linear_(module, std=0.02)
        if self.config.pixel_nets != "transformer":
            return
        for part in (self.pixel_encoder, self.pixel_decoder):
            for module in part.modules():
                init_linear_(module)
                if isinstance(module, Attention):
                    module.bias_queries_and_keys(self.config.query_key_bias)
        init_linear_(self.pixel_decoder.to_pixels, std=0.02)
        nn.init.dirac_(self.pixel_decoder.smooth.weight)


def check_grids(config: DualTokenizerConfig, tower: ImageTower) -> None:
    """Refuse a tower that gives no token for each cell; CLIP's fits any number of its patches."""
    if tower.patch_size != config.patch_size:
        raise ValueError(
            f"dual.patch_size {config.patch_size}: the teacher's patches have {tower.patch_size} "
            "pixels, and the grids must agree"
        )
    if not tower.is_clip and tower.grid != config.grid_size:
        raise ValueError(
            f"dual.image_size {config.image_size}: the teacher reads images of "
            f"{tower.grid * tower.patch_size} pixels only"
        )


def tanh_head(width: int, channels: int) -> nn.Sequential:
    """Linear, tanh, Linear: to the codes, and to the teacher's features."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, channels))


# The semantic decoder; names are those of the published weights


class SemanticDecoder(nn.Module):
    """Semantic codes B x S x g x g -> tokens B x g^2 x W: BEiT's blocks on patches of one cell."""

    def __init__(self, channels: int, width: int, depth: int, num_heads: int, grid: int):
        super().__init__()
        # Here: it takes a second.
        from timm.models.beit import Block

        if width % num_heads:
            raise ValueError(f"semantic_heads {num_heads} does not divide the tower's {width}")
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, 1)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2 + 1, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = (Block(width, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)  # their keys have no biases
        self.fc_norm = norm(width)
        self.init_weights()

    def forward(self, codes: Tensor) -> Tensor:
        x = place_tokens(self.patch_embed(codes), self.cls_token[0, 0], self.pos_embed[0])
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])

    def init_weights(self) -> None:
        """Normal 0.02; what a block adds is the smaller the deeper it is."""
        for module in self.modules():
            init_linear_(module, std=0.02)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight /= (2 * number) ** 0.5
                block.mlp.fc2.weight /= (2 * number) ** 0.5
