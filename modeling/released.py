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
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modeling.flow import FlowConfig
from modeling.flow_model import build_flow
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.layers import axial_rope_table, sincos_position_table
from modeling.text_projector import TextProjectorConfig

LATENT_SCALE = 1.0143  # 1 / deviation of the released tokenizer's latents
FLOW_HEADS = {(768, 12): 12, (1152, 28): 16, (1280, 36): 20}  # B, XL, H: (width, depth) -> heads
HEAD_DIM = 64  # of every published tokenizer
TABLE_TOLERANCE = 1e-4
TEMPERATURE = "t2t_temperature"
ROPE = "{}.positional_embedding.freqs_{}"  # of encoder or decoder, cos or sin
GAINS = r"projector\.blocks\.\d+\.norm_(attention|mlp)\.weight"
CONVOLUTIONS = ("encoder.to_moments.weight", "decoder.to_pixels.weight")  # 1x1 convolutions there

# ours -> theirs, by module (weight and bias) or by tensor; N numbers the blocks
Names = dict[str, str | tuple[str, ...]]
FLOW_NAMES: Names = {
    "projector.blocks.N.attention.qkv": tuple(
        f"context_encoder.layers.N.attn.W_{part}" for part in "QKV"
    ),
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
TOKENIZER_NAMES: Names = {
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


def convert(
    tensors: dict[str, Tensor], num_heads: int | None = None, latent_scale: float = LATENT_SCALE
) -> Converted:
    """Convert the tensors of a released file, of either kind.

    Args:
        tensors: by their names in the file, without wrappers and prefixes. Meta tensors give meta
            tensors.
        num_heads: of a flow that is none of B, XL, H; a tokenizer's tables give its heads.
        latent_scale: of a flow: z_I = latent_scale * tokenizer latent.

    Raises:
        ValueError: neither kind of file; tensors missing, unknown or of another shape; fixed tables
            of other values.
    """
    if recognise(tensors) == "flowtok":
        return convert_flow(tensors, num_heads, latent_scale)
    return convert_tokenizer(tensors)


def convert_flow(
    tensors: dict[str, Tensor], num_heads: int | None, latent_scale: float
) -> Converted:
    """Projector and velocity network of a flow file."""
    # A file that lacks the temperature has it where it starts
    tensors = {TEMPERATURE: torch.tensor(math.log(1 / 0.07))} | tensors
    projector, flowtok = TextProjectorConfig(), flow_size(tensors)
    with torch.device("meta"):
        ours = build_flow(projector, flowtok, FlowConfig()).state_dict()
    del ours["latent_scale"]
    tables = {"pos_embed": sincos_position_table(flowtok.num_tokens, flowtok.width)[None]}
    sources = match(ours, FLOW_NAMES, tensors, tables)
    flowtok = replace(flowtok, num_heads=find_heads(flowtok, num_heads))
    converted = fill(ours, sources, tensors)
    # Their LayerNorm divides by the unbiased deviation
    for name in converted:
        if re.fullmatch(GAINS, name):
            converted[name] *= math.sqrt((projector.width - 1) / projector.width)
    converted["latent_scale"] = torch.tensor(latent_scale)
    return Converted("flowtok", {"projector": projector, "flowtok": flowtok}, converted)


def convert_tokenizer(tensors: dict[str, Tensor]) -> Converted:
    """Encoder and decoder of a tokenizer file."""
    config = tokenizer_size(tensors)
    with torch.device("meta"):
        ours = ImageTokenizer(config).state_dict()
    sources = match(ours, TOKENIZER_NAMES, tensors, rope_tables(config))
    return Converted("tokenizer", {"tokenizer": config}, fill(ours, sources, tensors))


def recognise(tensors: dict[str, Tensor]) -> str:
    """Stage of the network that a file holds, by its tensors' names: flowtok or tokenizer."""
    tables = {"flowtok": FLOW_NAMES, "tokenizer": TOKENIZER_NAMES}
    hits = {stage: num_known(tensors, names) for stage, names in tables.items()}
    if not any(hits.values()):
        found = ", ".join(printable(name) for name in list(tensors)[:3])
        raise ValueError(f"it is no released flow or tokenizer file: it holds {found or 'nothing'}")
    return max(hits, key=hits.get)


def generic(name: str) -> str:
    """A tensor's name, ours or theirs, with N for the number of the block."""
    return re.sub(r"\b(blocks|layers|transformer)\.\d+\.", r"\1.N.", name)


def is_known(name: str, released: set[str]) -> bool:
    """Whether a file's tensor is one of a table's, in a block of whatever number."""
    return generic(name) in released or generic(name).rpartition(".")[0] in released


def released_set(names: Names) -> set[str]:
    """All released names of a table."""
    return {one for theirs in names.values() for one in as_tuple(theirs)}


def as_tuple(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    """One name as several."""
    return (theirs,) if isinstance(theirs, str) else theirs


def num_known(tensors: dict[str, Tensor], names: Names) -> int:
    """How many tensors have a name of the table."""
    released = released_set(names)
    return sum(is_known(name, released) for name in tensors)


def released_names(name: str, names: Names) -> list[str]:
    """The released tensors that hold one of ours, in the order in which they are packed."""
    number = re.search(r"blocks\.(\d+)\.", name)
    theirs, leaf = names.get(generic(name)), ""
    if theirs is None:
        module, _, leaf = generic(name).rpartition(".")
        theirs, leaf = names[module], f".{leaf}"
    block = f".{number[1]}." if number else ".N."
    return [(one + leaf).replace(".N.", block) for one in as_tuple(theirs)]


def match(
    ours: dict[str, Tensor], names: Names, tensors: dict[str, Tensor], tables: dict[str, Tensor]
) -> dict[str, list[str]]:
    """Our names -> the tensors that hold them, all checked; `ours` gives names and shapes."""
    sources = {name: released_names(name, names) for name in ours}
    shapes = {name: table.shape for name, table in tables.items()}
    for name, theirs in sources.items():
        # 1x1 convolutions have two more dimensions there; what is packed here has equal parts there
        shape = (*ours[name].shape, 1, 1) if name in CONVOLUTIONS else ours[name].shape
        shape = (shape[0] // len(theirs), *shape[1:]) if len(theirs) > 1 else shape
        shapes |= {one: shape for one in theirs}
    check_shapes(tensors, shapes, optional=set(tables))
    check_tables(tensors, tables)
    return sources


def fill(
    ours: dict[str, Tensor], sources: dict[str, list[str]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of the file's tensors by our names, packed and shaped as ours, in float32."""
    filled = {}
    for name, theirs in sources.items():
        parts = [tensors[one].detach().to(torch.float32) for one in theirs]
        filled[name] = (
            torch.cat(parts).reshape(ours[name].shape) if parts[0].ndim else parts[0].clone()
        )
    return filled


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, Any], optional: set[str]) -> None:
    """Refuse tensors that are not what the network needs; names the first."""
    problems = []
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            found = dimensions(tensors[name].shape)
            problems.append(f"{name} is {found}, expected {dimensions(shape)}")
    absent = [name for name in shapes if name not in tensors and name not in optional]
    problems += [f"{name} is missing" for name in absent]
    problems += [f"{printable(name)} is unknown" for name in tensors if name not in shapes]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)


def check_tables(tensors: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    """Refuse fixed tables that differ from ours, which are used; one of zeros was never filled."""
    for name, table in tables.items():
        if name in tensors and tensors[name].any():
            found = tensors[name].detach()
            # Values are at most 1
            rounding = 0.0 if found.dtype.itemsize >= 4 else torch.finfo(found.dtype).eps
            error = (found.float() - table).abs().max().item()
            if not error <= TABLE_TOLERANCE + rounding:
                raise ValueError(
                    f"{name} differs from the table of this network by {error:.2g}: another network"
                )


def flow_size(tensors: dict[str, Tensor]) -> FlowTokConfig:
    """Width and depth of the velocity network in a flow file; no shape shows its heads: 1."""
    places = {"x_embedder.weight": 0, "x_embedder.bias": 0, "final_layer.linear.weight": 1}
    sizes = sizes_at(tensors, *places.items(), ("pos_embed", 2))
    width = majority(sizes, "x_embedder.weight")
    return FlowTokConfig(width=width, depth=num_blocks(tensors, "blocks.", FLOW_NAMES), num_heads=1)


def find_heads(flow: FlowTokConfig, num_heads: int | None) -> int:
    """The heads of a flow: known for B, XL and H, else given."""
    known = FLOW_HEADS.get((flow.width, flow.depth))
    size = f"width {flow.width} and depth {flow.depth}"
    if known is None and num_heads is None:
        raise ValueError(
            f"it is a flow of {size}, none of B, XL, H, and the file does not say its number of "
            "heads: give --num-heads"
        )
    if None not in (known, num_heads) and known != num_heads:
        raise ValueError(f"a flow of {size} has {known} heads, --num-heads says {num_heads}")
    heads = known or num_heads
    if heads < 1 or flow.width % heads:
        raise ValueError(f"--num-heads {heads} does not divide the flow's width {flow.width}")
    return heads


def tokenizer_size(tensors: dict[str, Tensor]) -> ImageTokenizerConfig:
    """Sizes of a tokenizer file; its RoPE tables are grid^2 x head size."""
    rope = [ROPE.format(part, table) for part in ("encoder", "decoder") for table in ("cos", "sin")]
    num_patches = majority(sizes_at(tensors, *((name, 0) for name in rope)), rope[0])
    grid = math.isqrt(num_patches)
    if grid**2 != num_patches:
        raise ValueError(f"{rope[0]} has {num_patches} rows, expected a square number of patches")
    pixels = sizes_at(tensors, ("decoder.ffn.0.weight", 0), ("decoder.ffn.0.bias", 0))
    patches = sizes_at(tensors, ("encoder.patch_embed.weight", 2))
    patch_size = majority(
        [math.isqrt(n // 3) for n in pixels] + patches, "encoder.patch_embed.weight"
    )
    return ImageTokenizerConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        encoder=transformer_size(tensors, "encoder", "latent_tokens"),
        decoder=transformer_size(tensors, "decoder", "decoder.mask_token"),
    )


def transformer_size(tensors: dict[str, Tensor], part: str, token: str) -> TransformerSize:
    """Size of the encoder's or decoder's transformer; `token`: a tensor with the width as last."""
    width = majority(
        sizes_at(tensors, (f"{part}.ln_pre.weight", 0), (f"{part}.ln_post.weight", 0), (token, -1)),
        token,
    )
    rope = ROPE.format(part, "cos")
    head_dim = majority(
        [*sizes_at(tensors, (rope, 1), (ROPE.format(part, "sin"), 1)), HEAD_DIM], rope
    )
    if width % head_dim:
        raise ValueError(f"{rope} says heads of {head_dim}, which do not divide the width {width}")
    return TransformerSize(
        width, num_blocks(tensors, f"{part}.transformer.", TOKENIZER_NAMES), width // head_dim
    )


def sizes_at(tensors: dict[str, Tensor], *places: tuple[str, int]) -> list[int]:
    """What tensors say about one size: places are (name, dimension); absent ones are left out."""
    return [
        tensors[name].shape[d]
        for name, d in places
        if name in tensors and tensors[name].ndim > max(d, 0)
    ]


def majority(sizes: list[int], name: str) -> int:
    """The most frequent size: a single tensor of a wrong shape is then the one found wrong.

    name: the tensor that is missing if there is no size.
    """
    sizes = [size for size in sizes if size]
    if not sizes:
        raise ValueError(f"{name} is missing or empty")
    return Counter(sizes).most_common(1)[0][0]


def num_blocks(tensors: dict[str, Tensor], prefix: str, names: Names) -> int:
    """Blocks under a prefix: the highest number of a tensor that a block has, plus 1."""
    released, highest = released_set(names), -1
    for name in tensors:
        number = re.match(re.escape(prefix) + r"(\d{1,9})\.", name)
        if number and is_known(name, released):
            highest = max(highest, int(number[1]))
    if not 0 <= highest < len(tensors):
        raise ValueError(f"blocks are missing between {prefix}0 and {prefix}{max(highest, 0)}")
    return highest + 1


def rope_tables(config: ImageTokenizerConfig) -> dict[str, Tensor]:
    """RoPE tables as in the files: grid^2 x head size, each value for two adjacent channels."""
    grid = config.grid_size
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    tables = {}
    for part, size in (("encoder", config.encoder), ("decoder", config.decoder)):
        angles = axial_rope_table(rows.flatten(), columns.flatten(), size.width // size.num_heads)
        angles = angles.repeat_interleave(2, dim=-1)
        tables |= {ROPE.format(part, "cos"): angles.cos(), ROPE.format(part, "sin"): angles.sin()}
    return tables


def dimensions(shape: Any) -> str:
    """A shape as text: 77 x 768."""
    return " x ".join(map(str, shape)) or "a single number"


def printable(name: str) -> str:
    """A name from a file of unknown origin, short and on one line."""
    return name if name.isprintable() and len(name) <= 100 else repr(name[:100])
