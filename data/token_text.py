"""Stored image latents with captions -> batches for the text projector and the flow (legend: K tokens, C channels).

A sample, for K = 77, C = 16 and a text tower of 77 x 768:
    000000012.latent.npy  float16 (2, 77, 16): mean, then log-variance, of the image tokenizer's posterior
    000000012.txt         a dog on a beach
    000000012.json        {"caption": "a dog on a beach", ...}
    000000012.text.npy    optional, float16 (77, 768): last hidden states of the frozen text tower for the caption
In place of latent.npy, the FlowTok release's `token.npy` is read: no header, little-endian float16 values of shape
(2C, K) = 32 x 77, mean channels first.

A shape that does not fit the run stops it; values that are missing, unreadable or not finite skip the sample.
"""

import ast
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from data.captions import CaptionChoice, Tokenize, collate_text
from data.draws import SampleDraws
from data.filters import SampleFilter
from data.mixture import ReaderConfig, SourceConfig, check_metadata, open_sources
from data.shards import BadSample, ShardStream, build_loader, read_batches

NPY_MAGIC = b"\x93NUMPY"


@dataclass
class TokenTextConfig(ReaderConfig):
    """Token shards. Of the filters, those on captions and on the sample's JSON apply."""

    # accept shards that another tokenizer made, or nobody knows which
    any_tokenizer: bool = False
    # z_I = latent_scale * latent; 0: as measured when the tokens were written
    latent_scale: float = 0.0


def build_token_loader(
    cfg: TokenTextConfig,
    num_tokens: int,
    token_channels: int,
    tokenize: Tokenize | None,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """Endless shuffled batches of one rank; batch_size is per rank. See data.shards for order and resuming.

    "latent_mean", "latent_logvar": B x K x C float32; "text_states": B x L x W float16, absent if no sample has them;
    "token_ids": B x L int64, absent if tokenize is None; "caption", "key": lists of str;
    "skipped": {reason: count} since the last batch of the same worker.
    ValueError while iterating: arrays of another shape or type, text states in only some samples of a batch.
    """
    stream = ShardStream(
        open_sources(cfg, partial(_decoder, num_tokens, token_channels)),
        TokenCollate(tokenize),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle_buffer=cfg.shuffle_buffer,
        max_bad_share=cfg.max_bad_share,
    )
    return build_loader(stream, cfg.num_workers, pin_memory)


def read_tokens(
    cfg: TokenTextConfig,
    num_tokens: int,
    token_channels: int,
    tokenize: Tokenize | None,
    batch_size: int,
    shards: Sequence[str] | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass in order, first caption, in this process; batches as above, the last one may be short.

    shards: patterns to read instead of the config's, for example one rank's part; with the captions and filters of the
    config itself, whatever its sources say. limit: samples at most.
    """
    sources = open_sources(cfg, partial(_decoder, num_tokens, token_channels), shards)
    return read_batches(sources, TokenCollate(tokenize), batch_size, cfg.max_bad_share, limit)


def _decoder(num_tokens: int, token_channels: int, source: SourceConfig) -> "TokenDecode":
    return TokenDecode(
        num_tokens, token_channels, source.caption_choice(), SampleFilter(source.filters)
    )


@dataclass(frozen=True)
class TokenDecode:
    """Raw sample -> {"latent": 2 x K x C float16, "text_states": L x W float16 or None, "caption", "key"}."""

    num_tokens: int
    token_channels: int
    captions: CaptionChoice
    filters: SampleFilter

    def __call__(self, sample: dict[str, Any], draws: SampleDraws | None) -> dict[str, Any]:
        caption = self.captions(sample, draws)
        check_metadata(self.filters, sample, caption)
        latent = self._latent(sample)
        if not np.isfinite(latent).all():
            raise BadSample("latent: not finite")
        states = None
        if "text.npy" in sample:
            states = _array(sample["text.npy"], "text.npy", sample["__key__"])
            if states.ndim != 2:
                raise ValueError(
                    f"{sample['__key__']}.text.npy: given shape {states.shape}, expected (L, W)"
                )
        return {
            "key": sample["__key__"],
            "caption": caption,
            "latent": latent,
            "text_states": states,
        }

    def _latent(self, sample: dict[str, Any]) -> np.ndarray:
        key, expected = sample["__key__"], (2, self.num_tokens, self.token_channels)
        if "latent.npy" in sample:
            latent = _array(sample["latent.npy"], "latent.npy", key)
            if latent.shape != expected:
                raise ValueError(
                    f"{key}.latent.npy: given shape {latent.shape}, expected {expected} = (2, K, C)"
                )
            return latent
        if "token.npy" in sample:
            return self._release_latent(sample["token.npy"], key)
        raise BadSample("latent: missing")

    def _release_latent(self, data: bytes, key: str) -> np.ndarray:
        shape = (2, self.token_channels, self.num_tokens)
        num_bytes = 2 * math.prod(shape)
        if len(data) != num_bytes:
            raise ValueError(
                f"{key}.token.npy: given {len(data)} bytes, expected {num_bytes}: float16 values of shape "
                f"{(2 * self.token_channels, self.num_tokens)} without a header"
            )
        return np.frombuffer(data, "<f2").reshape(shape).transpose(0, 2, 1)  # 2 x K x C


@dataclass(frozen=True)
class TokenCollate:
    """Decoded samples -> batch: one stack per array, one tokenizer call."""

    tokenize: Tokenize | None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        latents = torch.from_numpy(
            np.stack([sample["latent"] for sample in samples])
        )  # B x 2 x K x C
        mean, logvar = (
            part.to(torch.float32, memory_format=torch.contiguous_format)
            for part in latents.unbind(1)
        )
        batch = {
            "latent_mean": mean,
            "latent_logvar": logvar,
            **collate_text(samples, self.tokenize),
        }
        if any(sample["text_states"] is not None for sample in samples):
            batch["text_states"] = _stack_states(
                [sample["text_states"] for sample in samples], batch["key"]
            )
        return batch


def _stack_states(states: list[np.ndarray | None], keys: list[str]) -> torch.Tensor:
    """B x L x W float16. ValueError: a sample of the batch without states, or two shapes."""
    without = [key for key, state in zip(keys, states, strict=True) if state is None]
    if without:
        having = [key for key in keys if key not in without]
        raise ValueError(
            f"text.npy is in {len(having)} of {len(keys)} samples of a batch, expected in all or in none; "
            f"with it: {', '.join(having[:3])}, without: {', '.join(without[:3])}"
        )
    for key, state in zip(keys, states, strict=True):
        if state.shape != states[0].shape:
            raise ValueError(
                f"{key}.text.npy: given {state.shape}, expected {states[0].shape} as in {keys[0]}"
            )
    return torch.from_numpy(np.stack(states))


def _array(data: bytes, extension: str, key: str) -> np.ndarray:
    """A read-only float16 view of .npy bytes; np.load would parse the same header anew and copy."""
    part = extension.partition(".")[0]
    if data[:6] != NPY_MAGIC or len(data) < 12:
        raise BadSample(f"{part}: not an npy file")
    wide = data[6] > 1  # version 1 counts its header in two bytes, 2 and 3 in four
    start = 12 if wide else 10
    start += struct.unpack_from("<I" if wide else "<H", data, 8)[0]
    try:
        dtype, in_fortran_order, shape = _npy_header(data[12 if wide else 10 : start])
    except (ValueError, SyntaxError, KeyError, TypeError):
        raise BadSample(f"{part}: not an npy file") from None
    if dtype != "<f2" or in_fortran_order:
        raise ValueError(
            f"{key}.{extension}: given {dtype}, Fortran order {in_fortran_order}, expected '<f2' in C order"
        )
    count = math.prod(shape)
    if len(data) != start + 2 * count:
        raise BadSample(f"{part}: truncated")
    return np.frombuffer(data, "<f2", count, start).reshape(shape)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """(dtype, Fortran order, shape); cached, as a shard repeats the same few headers."""
    fields = ast.literal_eval(header.decode("latin1").strip())
    return fields["descr"], fields["fortran_order"], fields["shape"]
