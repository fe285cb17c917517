"""The released FlowTok files, and how their tensors become this repository's.

In: the tensors of a flow file (FlowTok-XL.pth, ...) or a tokenizer file (FlowTiTok_512.bin, ...) by
their names there. Out: our config of the same network and our state dict. Strict: every tensor is
used, none is missing, every shape is checked. What differs beyond names: the projector's q, k, v
are packed into one linear; its LayerNorm divides by the unbiased deviation, which the gain makes up
for; 1x1 convolutions are linear layers here. Fixed tables (positions, RoPE) are computed here and
only compared.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .flow import FlowConfig
from .flow_model import build_flow
from .flowtok import FlowTokConfig
from .image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from .layers import axial_rope_table, sincos_position_table
from .text_projector import TextProjectorConfig

LATENT_SCALE = 1.0143  # 1 / deviation of the released tokenizer's latents
FLOW_HEADS = {(768, 12): 12, (1152, 28): 16, (1280, 36): 20}  # B, XL, H: (width, depth) -> heads
HEAD_DIM = 64  # of the tokenizers
TABLE_TOLERANCE = 1e-4
TEMPERATURE = "t2t_temperature"
GAINS = r"projector\.blocks\.\d+\.norm_(attention|mlp)\.weight"
ROPE_TABLE = "encoder.positional_embedding.freqs_cos"
CONVOLUTIONS = ("encoder.to_moments.weight", "decoder.to_pixels.weight")  # 1x1 there

# Ours -> theirs: whole names, or those of modules with weight and bias. N numbers the blocks.
FLOW_NAMES = {
    "projector.blocks.N.attention.qkv": "context_encoder.layers.N.attn.W_{Q,K,V}",
    "projector.blocks.N.attention.out": "context_encoder.layers.N.attn.W_O",
    "projector.blocks.N.norm_attention.weight": "context_encoder.layers.N.norm1.g",
    "projector.blocks.N.norm_attention.bias": "context_encoder.layers.N.norm1.b",
    "projector.blocks.N.mlp.0": "context_encoder.layers.N.feed_forward.ffn_1",
    "projector.blocks.N.mlp.2": "context_encoder.layers.N.feed_forward.ffn_2",
    "projector.blocks.N.norm_mlp.weight": "context_encoder.layers.N.norm2.g",
    "projector.blocks.N.norm_mlp.bias": "context_encoder.layers.N.norm2.b",
    "projector.to_moments": "context_encoder.linear",
    "projector.alignment.mlp.0": "context_projector.0",
    "projector.alignment.mlp.2": "context_projector.2",
    "projector.alignment.mlp.4": "context_projector.4",
    "projector.alignment.log_temperature": TEMPERATURE,
    "flowtok.embed_tokens": "x_embedder",
    "flowtok.embed_time.mlp.0": "t_embedder.mlp.0",
    "flowtok.embed_time.mlp.2": "t_embedder.mlp.2",
    "flowtok.embed_null": "y_embedder.embedding_table",
    "flowtok.blocks.N.modulation": "blocks.N.adaLN_modulation.1",
    "flowtok.blocks.N.attention.qkv": "blocks.N.attn.qkv",
    "flowtok.blocks.N.attention.out": "blocks.N.attn.proj",
    "flowtok.blocks.N.mlp.0": "blocks.N.mlp.fc1",
    "flowtok.blocks.N.mlp.2": "blocks.N.mlp.fc2",
    "flowtok.modulation_out": "final_layer.adaLN_modulation.1",
    "flowtok.to_velocity": "final_layer.linear",
}
PART_NAMES = {  # of encoder and decoder
    "transformer.norm_in": "ln_pre",
    "transformer.blocks.N.norm_attention": "transformer.N.ln_1",
    "transformer.blocks.N.attention.qkv": "transformer.N.attn.qkv",
    "transformer.blocks.N.attention.out": "transformer.N.attn.proj",
    "transformer.blocks.N.norm_mlp": "transformer.N.ln_2",
    "transformer.blocks.N.mlp.gate_value": "transformer.N.mlp.w12",
    "transformer.blocks.N.mlp.out": "transformer.N.mlp.w3",
    "transformer.norm_out": "ln_post",
    "latent_positions": "latent_token_positional_embedding",
}
TOKENIZER_NAMES = {
    **{f"encoder.{ours}": f"encoder.{theirs}" for ours, theirs in PART_NAMES.items()},
    **{f"decoder.{ours}": f"decoder.{theirs}" for ours, theirs in PART_NAMES.items()},
    "encoder.latent_tokens": "latent_tokens",
    "encoder.patch_embed": "encoder.patch_embed",
    "encoder.to_moments": "encoder.conv_out",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.embed_tokens": "decoder.decoder_embed",
    "decoder.embed_text": "decoder.text_guidance_proj",
    "decoder.text_positions": "decoder.text_guidance_positional_embedding",
    "decoder.to_pixels": "decoder.ffn.0",
    "decoder.smooth": "decoder.conv_out",
}


@dataclass
class Converted:
    """A released network in our terms."""

    stage: str  # flowtok or tokenizer
    networks: dict[str, Any]  # sections of that stage's config
    tensors: dict[str, Tensor]  # float32, by our names


def convert(tensors: dict[str, Tensor], num_heads: int | None = None) -> Converted:
    """Convert the tensors of a released file, of either kind.

    Args:
        tensors: by their names in the file, without wrappers and prefixes. Meta tensors give meta
            tensors.
        num_heads: of a flow that is none of B, XL, H; those of a tokenizer are 64 wide.

    Raises:
        ValueError: neither kind of file; tensors missing, unknown or of another shape; fixed tables
            of other values.
    """
    if any(name.startswith(("context_encoder.", "x_embedder.")) for name in tensors):
        return convert_flow(tensors, num_heads)
    if any(name.startswith(("encoder.transformer.", "decoder.transformer.")) for name in tensors):
        return convert_tokenizer(tensors)
    found = ", ".join(list(tensors)[:3]) or "nothing"
    raise ValueError(f"it is no released flow or tokenizer file: it holds {found}")


def convert_flow(tensors: dict[str, Tensor], num_heads: int | None) -> Converted:
    """Projector and velocity network of a flow file."""
    # No shape shows the heads, and none depends on them.
    width = size_of(tensors, "x_embedder.weight", 0)
    depth = num_blocks(tensors, "blocks.")
    flowtok = FlowTokConfig(width=width, depth=depth, num_heads=1)
    projector = TextProjectorConfig()
    # On the meta device: names and shapes are all that is wanted of the network.
    with torch.device("meta"):
        ours = build_flow(projector, flowtok, FlowConfig()).state_dict()
    del ours["latent_scale"]

    # A file that lacks the temperature, which only training reads, has it where it starts.
    tensors = {TEMPERATURE: torch.tensor(math.log(1 / 0.07))} | tensors
    tables = {"pos_embed": sincos_position_table(flowtok.num_tokens, width)[None]}
    converted = take(ours, partial(released_names, FLOW_NAMES), tensors, tables, tables)

    size = f"a flow of width {width} and depth {depth}"
    heads = FLOW_HEADS.get((width, depth), num_heads)
    if heads is None:
        raise ValueError(f"it is {size}, none of B, XL, H: give --num-heads")
    if num_heads not in (None, heads):
        raise ValueError(f"{size} has {heads} heads, --num-heads says {num_heads}")
    if heads < 1 or width % heads:
        raise ValueError(f"--num-heads {heads} does not divide the flow's width {width}")
    flowtok = replace(flowtok, num_heads=heads)

    # Their LayerNorm divides by the unbiased deviation.
    for name in converted:
        if re.fullmatch(GAINS, name):
            converted[name] *= math.sqrt((projector.width - 1) / projector.width)
    converted["latent_scale"] = torch.tensor(LATENT_SCALE)
    return Converted("flowtok", {"projector": projector, "flowtok": flowtok}, converted)


def convert_tokenizer(tensors: dict[str, Tensor]) -> Converted:
    """Encoder and decoder of a tokenizer file."""
    # The RoPE tables have a row for each patch
    rope = next((name for name in tensors if ".freqs_" in name), ROPE_TABLE)
    grid = math.isqrt(size_of(tensors, rope, 0))
    patch_size = size_of(tensors, "encoder.patch_embed.weight", 2)
    config = ImageTokenizerConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_tokens=77,
        encoder=transformer_size(tensors, "encoder.transformer."),
        decoder=transformer_size(tensors, "decoder.transformer."),
    )
    with torch.device("meta"):
        ours = ImageTokenizer(config).state_dict()
    tables = rope_tables(config)
    converted = take(ours, partial(released_names, TOKENIZER_NAMES), tensors, tables, tables)
    return Converted("tokenizer", {"tokenizer": config}, converted)


# Names and values


def take(
    ours: dict[str, Tensor],
    find: Callable[[str], list[str]],
    tensors: dict[str, Tensor],
    tables: dict[str, Tensor],
    optional: Iterable[str],
) -> dict[str, Tensor]:
    """The values of a state dict from a file's tensors, float32 copies.

    Args:
        ours: gives names and shapes.
        find: of one of ours, the names there of what holds it, in the order in which it is packed.
        tables: what a file has besides, by its names there, of which `optional` may be missing.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape; tables of other values.
    """
    # The shape there of what holds each of ours.
    sources = {name: find(name) for name in ours}
    shapes = {name: tuple(table.shape) for name, table in tables.items()}
    for name, theirs in sources.items():
        # Of a 1x1 convolution, which is a linear layer here; of q, k and v, a third of ours each.
        shape = (*ours[name].shape, 1, 1) if name in CONVOLUTIONS else tuple(ours[name].shape)
        if len(theirs) > 1:
            shape = (shape[0] // len(theirs), *shape[1:])
        shapes |= dict.fromkeys(theirs, shape)

    # Strict: the first three that do not fit are named.
    problems = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f"{name} is missing" for name in shapes if name not in {*tensors, *optional}]
    problems += [f"{name} is unknown" for name in tensors if name not in shapes]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    check_tables(tensors, tables)

    # Copies, of which a caller may scale some in place; a lone number is the file's own.
    taken = {}
    for name, theirs in sources.items():
        parts = [tensors[one].detach().to(torch.float32) for one in theirs]
        whole = torch.cat(parts) if parts[0].ndim else parts[0]
        taken[name] = whole.reshape(ours[name].shape)
    return taken


def released_names(names: dict[str, str], name: str) -> list[str]:
    """The released tensors that hold one of ours: one, or the projector's q, k, v."""
    block = re.search(r"blocks\.(\d+)\.", name)
    generic = re.sub(r"blocks\.\d+\.", "blocks.N.", name)
    module, _, leaf = generic.rpartition(".")
    theirs = names[generic] if generic in names else f"{names[module]}.{leaf}"
    if block:
        theirs = theirs.replace(".N.", f".{block[1]}.")
    if "{Q,K,V}" in theirs:
        return [theirs.replace("{Q,K,V}", part) for part in "QKV"]
    return [theirs]


def check_tables(tensors: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    """Refuse fixed tables that differ from ours, which are used; one of zeros was never filled."""
    for name, table in tables.items():
        if name in tensors and not tensors[name].is_meta and tensors[name].any():
            found = tensors[name].detach()
            # Values are at most 1.
            rounding = 0.0 if found.dtype.itemsize >= 4 else torch.finfo(found.dtype).eps
            error = (found.float() - table).abs().max().item()
            if not error <= TABLE_TOLERANCE + rounding:
                raise ValueError(
                    f"{name} differs from the table of this network by {error:.2g}: another network"
                )


def rope_tables(config: ImageTokenizerConfig) -> dict[str, Tensor]:
    """RoPE tables as in the files: grid^2 x head size, each value for two adjacent channels."""
    places = torch.arange(config.grid_size)
    angles = axial_rope_table(places, places, HEAD_DIM).repeat_interleave(2, dim=-1)
    tables = {}
    for part in ("encoder", "decoder"):
        tables[f"{part}.positional_embedding.freqs_cos"] = angles.cos()
        tables[f"{part}.positional_embedding.freqs_sin"] = angles.sin()
    return tables


# Sizes


def size_of(tensors: dict[str, Tensor], name: str, dimension: int) -> int:
    """One dimension of a tensor; ValueError if it is missing or has no such dimension."""
    if name not in tensors or tensors[name].ndim <= dimension or not tensors[name].numel():
        raise ValueError(f"{name} is missing")
    return tensors[name].shape[dimension]


def num_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    """Different numbers of blocks under a prefix."""
    # Counted, not the largest number: a file that names block 10^9 builds no network of that size.
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found[1] for name in tensors if (found := pattern.match(name))})


def transformer_size(tensors: dict[str, Tensor], prefix: str) -> TransformerSize:
    """Size of a tokenizer's encoder or decoder."""
    width = size_of(tensors, f"{prefix}0.attn.proj.weight", 0)
    if width % HEAD_DIM:
        raise ValueError(f"{prefix}* has width {width}, expected a multiple of {HEAD_DIM}")
    return TransformerSize(width, num_blocks(tensors, prefix), width // HEAD_DIM)
