"""The published TokenFlow tokenizers, and how their tensors become this repository's.

In: the tensors of tokenflow_clipb_32k_enhanced.pt or tokenflow_siglip_32k.pt by their names there.
Out: our config of the same network and our state dict. Strict as modeling/released.py: every tensor
but a log is used, or compared where it is fixed; none is missing; every shape is checked. What
differs beyond names: SigLIP's tower is timm's here, whose q, k, v are packed.
"""

import re

import torch
from torch import Tensor

from .dual_quantizer import QuantizerConfig
from .dual_tokenizer import DualTokenizer, DualTokenizerConfig
from .image_tower import TeacherConfig, describe_tower
from .pixel_nets import ConvolutionSize
from .released import Converted, num_blocks, size_of, take

CLIP_POSITIONS = "encoder_vqkd.positional_embedding"
SIGLIP_POSITIONS = "encoder_vqkd.vision_model.embeddings.position_embedding.weight"
PUBLISHED = {  # whether it is CLIP -> teacher, image size, scales: what no tensor shows
    True: (TeacherConfig("ViT-B-16-quickgelu", "openai"), 256, [1, 2, 4, 6, 8, 10, 12, 14, 16]),
    False: (
        TeacherConfig("ViT-SO400M-14-SigLIP-384", "webli"),
        384,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27],
    ),
}
HEADS = 12  # of the semantic decoder
USED = "quantize.codebook_used"  # the last indices, for a log
SHIFT, SCALE = "scaling_layer.shift", "scaling_layer.scale"  # SigLIP's mean and deviation
IN_PROJ = "encoder_vqkd.vision_model.head.attention.in_proj_"  # q, k, v of SigLIP's pooling

# Beginnings of ours -> theirs
PARTS = {
    "pixel_encoder.net.": "encoder.",
    "pixel_encoder.to_codes.": "quant_conv.",
    "pixel_decoder.net.": "decoder.",
    "pixel_decoder.from_codes.": "post_quant_conv.",
    "semantic_encoder.visual.trunk.": "encoder_vqkd.vision_model.",
    "semantic_encoder.visual.": "encoder_vqkd.",
    "semantic_decoder.": "decoder_vqkd.",
    "to_semantic_codes.": "encode_task_layer.",
    "to_features.": "decode_task_layer.",
    "quantizer.semantic_codes": "quantize.embedding_vqkd.weight",
    "quantizer.pixel_codes": "quantize.embedding_vqgan.weight",
}
# Parts of names of timm's tower -> those of SigLIP's
SIGLIP = {
    r"model\.patch_embed\.proj": "model.embeddings.patch_embedding",
    r"model\.pos_embed": "model.embeddings.position_embedding.weight",
    r"model\.norm\.": "model.post_layernorm.",
    r"model\.blocks\.": "model.encoder.layers.",
    r"attn\.qkv": "self_attn.{q,k,v}_proj",
    r"(layers\.\d+\.)attn\.proj": r"\1self_attn.out_proj",
    r"norm([12])\.": r"layer_norm\1.",
    r"attn_pool\.latent": "head.probe",
    r"attn_pool\.(q|kv)\.(\w+)": r"head.attention.in_proj_\2:\1",
    r"attn_pool\.proj": "head.attention.out_proj",
    r"attn_pool\.norm": "head.layernorm",
    r"attn_pool\.mlp": "head.mlp",
}


def is_dual(tensors: dict[str, Tensor]) -> bool:
    """Whether a file holds such a tokenizer."""
    return any(name.startswith("encoder_vqkd.") for name in tensors)


def convert_dual(tensors: dict[str, Tensor]) -> Converted:
    """Config and state of a published tokenizer. CLIP's reads images of 256 pixels, as used.

    Raises:
        ValueError: tensors missing, unknown or of another shape; fixed ones of other values.
    """
    config = read_config(tensors)
    with torch.device("meta"):
        ours = DualTokenizer(config).state_dict()
    counts = ours.pop("quantizer.counts")  # ours alone: nothing was chosen yet

    # Ours has a batch of positions, and two parts for the pooling's packed weights.
    split = {name: tensor for name, tensor in tensors.items() if name != USED}
    if SIGLIP_POSITIONS in split:
        split[SIGLIP_POSITIONS] = split[SIGLIP_POSITIONS][None]
    for leaf in ("weight", "bias"):
        if (name := IN_PROJ + leaf) in split:
            packed = split.pop(name)
            query = len(packed) // 3
            split |= {f"{name}:q": packed[:query], f"{name}:kv": packed[query:]}

    fixed = () if CLIP_POSITIONS in tensors else (SHIFT, SCALE)
    tables = dict.fromkeys(fixed, torch.full((1, 3, 1, 1), 0.5))
    taken = take(ours, published_names, split, tables, optional=())
    taken["quantizer.counts"] = torch.zeros(counts.shape)
    return Converted("tokenizer", {"dual": config}, taken)


def read_config(tensors: dict[str, Tensor]) -> DualTokenizerConfig:
    """Sizes by the shapes."""
    is_clip = CLIP_POSITIONS in tensors
    teacher, image_size, scales = PUBLISHED[is_clip]
    patch = "conv1.weight" if is_clip else "vision_model.embeddings.patch_embedding.weight"
    patch_size = size_of(tensors, f"encoder_vqkd.{patch}", 2)

    # Of the convolutions: each level's width, as a multiple of the first one's.
    channels = size_of(tensors, "encoder.conv_in.weight", 0)
    levels = range(num_blocks(tensors, "encoder.conv_blocks."))
    widths = [size_of(tensors, f"encoder.conv_blocks.{n}.res.0.conv1.bias", 0) for n in levels]
    convolutions = ConvolutionSize(
        channels=channels,
        multipliers=[width // channels for width in widths],
        decoder_channels=size_of(tensors, "decoder.conv_out.weight", 1),
        blocks=num_blocks(tensors, "encoder.conv_blocks.0.res."),
        decoder_blocks=num_blocks(tensors, "decoder.conv_blocks.0.res.") - 1,
    )
    quantizer = QuantizerConfig(
        num_codes=size_of(tensors, "quantize.embedding_vqkd.weight", 0),
        semantic_channels=size_of(tensors, "quantize.embedding_vqkd.weight", 1),
        pixel_channels=size_of(tensors, "quantize.embedding_vqgan.weight", 1),
        scales=scales,
    )
    return DualTokenizerConfig(
        image_size=image_size,
        patch_size=patch_size,
        teacher=teacher,
        semantic_depth=num_blocks(tensors, "decoder_vqkd.blocks."),
        semantic_heads=HEADS,
        convolutions=convolutions,
        quantizer=quantizer,
        tower=describe_tower(teacher),
    )


def published_names(name: str) -> list[str]:
    """The published tensors that hold one of ours: one, or q, k and v."""
    ours, theirs = next(part for part in PARTS.items() if name.startswith(part[0]))
    name = theirs + name.removeprefix(ours)
    if name.startswith("encoder_vqkd.vision_model."):
        for pattern, replacement in SIGLIP.items():
            name = re.sub(pattern, replacement, name)
    if "{q,k,v}" in name:
        return [name.replace("{q,k,v}", part) for part in "qkv"]
    return [name]
