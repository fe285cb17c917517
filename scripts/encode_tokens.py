"""Encode image shards with a trained tokenizer into token shards for stages 2 and 3 (format: data/token_text.py).

    accelerate launch --module scripts.encode_tokens --config configs/demo/tokens.yaml [key=value ...]

Shards are split over the processes, written aside and renamed; run the same command again to go on after a stop.
EXPERIMENT/tokens/tokens.json, written last, has the measured latent scale and the tokenizer's fingerprint.
"""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from configs.load import exit_on_error, parse_stage_args
from configs.schema import TokensStage
from data.image_text import read_images
from data.tar import count_samples, expand_shards, write_shard
from data.token_text import TokenTextConfig, read_tokens
from eval.loading import TOKENS_INFO_FILE, TokensInfo, fingerprint, load_tokenizer
from modeling.image_tokenizer import ImageTokenizer
from modeling.text_encoder import TextEncoder, TextTokenizer, load_text_encoder
from training.run import start_accelerator

SOURCE_FILE = "source.json"  # whose tokens the folder holds, while it is being written
STATISTICS_SAMPLES = 10_000  # the latent scale is measured over so many samples at most


def main(config: TokensStage) -> None:
    """Encode what is not there yet, then measure and write tokens.json."""
    accelerator = start_accelerator("fp32")
    folder = Path(config.run_dir)
    tokenizer, text_config = load_tokenizer(config.tokenizer_run)
    text_encoder = load_text_encoder(text_config)
    outputs = output_paths(expand_shards(config.data.shards), folder)
    source = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "text_encoder_fingerprint": fingerprint(text_encoder),
        "has_text_states": config.store_text_states,
        "shards": [path.name for path in outputs.values()],
    }
    if is_complete(folder, source):
        accelerator.print(f"{folder}: complete, {len(outputs)} shards, nothing to do")
        return
    if accelerator.is_main_process:
        claim_folder(folder, source)
    accelerator.wait_for_everyone()
    tokenizer, text_encoder = tokenizer.to(accelerator.device), text_encoder.to(accelerator.device)
    tokenize = TextTokenizer(text_config)
    mine = list(outputs.items())[accelerator.process_index :: accelerator.num_processes]
    start = time.perf_counter()
    for index, (image_shard, token_shard) in enumerate(mine):
        if token_shard.exists():
            continue
        samples = encode_shard(config, image_shard, tokenizer, text_encoder, tokenize)
        count = write_shard(token_shard, samples)
        left = (time.perf_counter() - start) / (index + 1) * (len(mine) - index - 1)
        print(f"[{accelerator.process_index}] {token_shard}: {count} samples, {left:.0f} s left", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        info = measure(outputs, tokenizer, source)
        info.save(folder)
        (folder / SOURCE_FILE).unlink()
        print(f"{folder}: {info.num_samples} samples, latent scale {info.latent_scale:.4f}", flush=True)
    accelerator.wait_for_everyone()


def output_paths(image_shards: list[str], folder: Path) -> dict[str, Path]:
    """Image shard -> token shard, by file name.

    Raises:
        ValueError: two image shards have the same name.
    """
    outputs = {
        shard: folder / (Path(shard).name.removesuffix(".gz").removesuffix(".tar") + ".tar") for shard in image_shards
    }
    if len(set(outputs.values())) != len(outputs):
        raise ValueError(f"data.shards has files of the same name in several folders: {', '.join(image_shards)}")
    return outputs


def is_complete(folder: Path, source: dict) -> bool:
    """True if the folder holds all tokens of this source.

    Raises:
        ValueError: it holds tokens of another tokenizer, text tower, list of shards or option.
    """
    if not (folder / TOKENS_INFO_FILE).is_file():
        return False
    check_source(folder, asdict(TokensInfo.load(folder)), source)
    return True


def check_source(folder: Path, found: dict, source: dict) -> None:
    """Refuse to mix what differs."""
    changed = [f"{key} was {found.get(key)}, is {value}" for key, value in source.items() if found.get(key) != value]
    if changed:
        raise ValueError(f"{folder} holds tokens of another source: {'; '.join(changed)}. Delete it and run this again")


def claim_folder(folder: Path, source: dict) -> None:
    """Write down whose tokens go into the folder, so that a continued run can't mix two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOURCE_FILE
    if path.is_file():
        check_source(folder, json.loads(path.read_text()), source)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(source))
    partial.rename(path)


def to_npy(array: torch.Tensor) -> bytes:
    """float16 .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array.to(torch.float16).cpu().numpy())
    return buffer.getvalue()


@torch.no_grad()
def encode_shard(
    config: TokensStage, shard: str, tokenizer: ImageTokenizer, text_encoder: TextEncoder, tokenize: TextTokenizer
) -> Iterator[dict]:
    """Samples of one token shard, in the order of the image shard."""
    device = next(tokenizer.parameters()).device
    image_size = tokenizer.config.image_size
    for batch in read_images(config.data, image_size, tokenize, config.batch_size, shards=[shard]):
        posterior = tokenizer.encode(batch["image"].to(device).float() / 255)
        latents = torch.stack([*posterior], dim=1)  # B x 2 x K x C
        states = text_encoder(batch["token_ids"].to(device)) if config.store_text_states else [None] * len(latents)
        for key, caption, latent, state in zip(batch["key"], batch["caption"], latents, states, strict=True):
            sample = {"__key__": key, "latent.npy": to_npy(latent), "txt": caption}
            yield sample if state is None else sample | {"text.npy": to_npy(state)}


def measure(outputs: dict[str, Path], tokenizer: ImageTokenizer, source: dict) -> TokensInfo:
    """Deviation of the sampled latents, and per-channel statistics of the means, from the written shards."""
    shards = TokenTextConfig(shards=[str(path) for path in outputs.values()])
    shape = (tokenizer.config.num_tokens, tokenizer.config.token_channels)
    batches = list(islice(read_tokens(shards, *shape, None, 100), STATISTICS_SAMPLES // 100))
    mean = torch.cat([b["latent_mean"] for b in batches]).double()  # N x K x C
    logvar = torch.cat([b["latent_logvar"] for b in batches]).double()
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    return TokensInfo(
        num_samples=sum(count_samples(path) for path in outputs.values()),
        num_tokens=shape[0],
        token_channels=shape[1],
        latent_scale=1 / deviation.item(),
        channel_mean=mean.mean(dim=(0, 1)).tolist(),
        channel_std=mean.std(dim=(0, 1)).tolist(),
        **source,
    )


if __name__ == "__main__":
    stage = parse_stage_args("tokens", __doc__)
    exit_on_error(lambda: main(stage))
