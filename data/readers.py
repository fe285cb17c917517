"""Stored tokens or captions -> batches, as a stream or in one pass (images: data/images.py).

A sample, for K = 77 tokens of C = 16 channels and a text tower of L x T = 77 x 768:
    000000012.jpg         images; or another extension of IMAGE_KEYS
    000000012.latent.npy  tokens: float16 (2, 77, 16), mean and log-variance of the image posterior
    000000012.text.npy    tokens, optional: float16 (77, 768), states of the frozen text tower
    000000012.txt         a dog on a beach
    000000012.json        {"captions": ["a dog on a beach", ...], "width": 640, ...}
In place of latent.npy, the FlowTok release's `token.npy` is read: no header, little-endian float16
values of shape (2C, K) = 32 x 77, mean channels first.

A batch has lists of B strings, "key" and "caption"; where a tokenizer is given, "token_ids": B x L
int64 and "captions_cut", the share that the text tower cuts; SampleCounter.tell; and what its
reader says. An array whose shape or type does not fit the run stops it; one that is missing,
unreadable or not finite skips its sample.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from data.captions import Tokenize, collate_text, metadata_of
from data.config import ReaderConfig, SourceConfig, open_sources
from data.samples import BadSample, SampleCounter, SampleDraws, check_fields
from data.shards import Collate, ShardLoader, ShardStream, build_loader, read_batches


@dataclass
class TokenTextConfig(ReaderConfig):
    """Token shards. Of the filters, those on captions and on the sample's JSON apply."""

    # accept token shards that another tokenizer made, or of unknown origin
    any_tokenizer: bool = False
    # z_I = latent_scale * latent; 0: as measured when the tokens were written
    latent_scale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        is_scale = 0 <= self.latent_scale < math.inf
        check_fields(self, latent_scale=(is_scale, "0 (as measured) or a positive number"))


# ------------------------------------------------------------------------------------------- reader


@dataclass(frozen=True)
class Reader:
    """The data of a config, decoded in one way."""

    config: ReaderConfig
    # (source's config, raw sample, its random numbers or None) -> decoded sample
    decode: Callable[[SourceConfig, dict[str, Any], SampleDraws | None], dict[str, Any]]
    collate: Collate

    def stream(
        self,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        pin_memory: bool = False,
    ) -> ShardLoader:
        """Endless shuffled batches of one rank, whose batch_size it is; order as in data.shards.

        Raises:
            ValueError: the config, shards that do not exist, a URL that cannot be read.
        """
        stream = ShardStream(
            sources=open_sources(self.config, self.decode),
            collate=self.collate,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            num_processes=num_processes,
            shuffle_buffer=self.config.shuffle_buffer,
            max_bad_share=self.config.max_bad_share,
        )
        return build_loader(stream, self.config.num_workers, pin_memory)

    def once(
        self, batch_size: int, shards: Sequence[str] | None = None, limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """One pass in order in this process, first captions; the last batch may be short.

        shards: patterns to read instead, with the captions and filters of the config itself,
        whatever its sources say. limit: samples at most.
        """
        return read_batches(
            sources=open_sources(self.config, self.decode, shards),
            collate=self.collate,
            batch_size=batch_size,
            counter=SampleCounter(self.config.max_bad_share, "reading in order"),
            limit=limit,
        )


def token_reader(
    config: TokenTextConfig,
    num_tokens: int,
    token_channels: int,
    tokenize: Tokenize | None,
    with_states: bool = True,
) -> Reader:
    """Batches with "latent_mean", "latent_logvar": B x K x C float32.

    with_states: and "text_states", B x L x T float16, unless no sample has them; if only some do,
    the run stops. Whose they are, the caller has to know.
    """
    decode = partial(decode_tokens, num_tokens, token_channels, with_states)
    return Reader(config, decode, partial(collate_tokens, tokenize))


def caption_reader(config: ReaderConfig, tokenize: Tokenize, with_states: bool) -> Reader:
    """Batches of captions, of any shards that have them; images and latents are not decoded.

    with_states: as by token_reader, but of every sample.
    """
    decode = partial(decode_caption, with_states)
    return Reader(config, decode, partial(collate_captions, tokenize))


# ----------------------------------------------------------------------------------------- decoders


def take_caption(
    source: SourceConfig, sample: dict[str, Any], draws: SampleDraws | None
) -> dict[str, Any]:
    """{"key", "caption"} of a raw sample that passes the filters, but for the size of its image.

    And "window", by which collate_text chooses sentences, where the config wants that.

    Raises:
        BadSample: no caption, dropped, or its JSON is needed by a filter and cannot be read.
    """
    caption = source.captions.choose(sample, draws, source.filters.caption_fault)
    # unparsed JSON saves time, and is no fault where no filter asks for it
    metadata = metadata_of(sample) if source.filters.needs_metadata else {}
    if metadata is None:
        raise BadSample("json: unreadable")
    source.filters.check_metadata(metadata)
    decoded = {"key": sample["__key__"], "caption": caption}
    if source.captions.window == "sentences":
        decoded["window"] = 0.0 if draws is None else draws.window
    return decoded


def decode_caption(
    with_states: bool, source: SourceConfig, sample: dict[str, Any], draws: SampleDraws | None
) -> dict[str, Any]:
    """Raw sample -> {"caption", "key"}, and "text_states" L x T float16 with_states."""
    # stored states are of the first caption
    decoded = take_caption(source, sample, None if with_states else draws)
    if with_states:
        decoded["text_states"] = read_array(sample, "text.npy", (None, None))
    return decoded


def decode_tokens(
    num_tokens: int,
    token_channels: int,
    with_states: bool,
    source: SourceConfig,
    sample: dict[str, Any],
    draws: SampleDraws | None,
) -> dict[str, Any]:
    """Raw sample -> {"latent": 2 x K x C float16, "caption", "key", "text_states" if stored}."""
    decoded = decode_caption(with_states and "text.npy" in sample, source, sample, draws)
    if "token.npy" in sample and "latent.npy" not in sample:
        # the FlowTok release's: values without a header, mean channels first
        shape, data = (2, token_channels, num_tokens), sample["token.npy"]
        if len(data) != 2 * math.prod(shape):
            raise ValueError(
                f"{sample['__key__']}.token.npy: given {len(data)} bytes, expected "
                f"{2 * math.prod(shape)}: float16 {(2 * token_channels, num_tokens)}, no header"
            )
        latent = np.frombuffer(data, "<f2").reshape(shape).transpose(0, 2, 1)  # 2 x K x C
    else:
        latent = read_array(sample, "latent.npy", (2, num_tokens, token_channels))
    if not np.isfinite(latent).all():
        raise BadSample("latent: not finite")
    return decoded | {"latent": latent}


def read_array(sample: dict[str, Any], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A float16 array of a raw sample. shape: None for an axis of any length.

    Raises:
        BadSample: missing, or no .npy file.
        ValueError: another type, or another shape.
    """
    part = name.removesuffix(".npy")
    if name not in sample:
        raise BadSample(f"{part}: missing")
    try:
        array = np.lib.format.read_array(io.BytesIO(sample[name]), allow_pickle=False)
    except Exception:  # numpy's parser raises many types on hostile bytes
        raise BadSample(f"{part}: not an npy file") from None
    fits = array.ndim == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    # of another tokenizer's or tower's run: all samples are, so the first one stops it
    if array.dtype != np.float16 or not array.flags.c_contiguous or not fits:
        raise ValueError(
            f"{sample['__key__']}.{name}: given {array.dtype} {array.shape}, expected float16 "
            f"{shape} in C order (None: any length)"
        )
    return array


def collate_captions(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch's text, with text states B x L x T where the samples have them.

    Raises:
        ValueError: states in only some samples, or of two shapes.
    """
    batch = collate_text(samples, tokenize)
    states = [sample.get("text_states") for sample in samples]
    shapes = [None if state is None else state.shape for state in states]
    for key, shape in zip(batch["key"], shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"text.npy: {batch['key'][0]} has the shape {shapes[0]}, {key} has {shape} (None: "
                "no text states), expected the same in all samples"
            )
    if shapes[0] is not None:
        batch["text_states"] = torch.from_numpy(np.stack(states))
    return batch


def collate_tokens(tokenize: Tokenize | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    latents = torch.from_numpy(np.stack([sample["latent"] for sample in samples]))  # B x 2 x K x C
    mean, logvar = (part.float().contiguous() for part in latents.unbind(1))
    return {"latent_mean": mean, "latent_logvar": logvar, **collate_captions(tokenize, samples)}
