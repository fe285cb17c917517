"""Encode image shards with a trained tokenizer into token shards for stages 2 and 3 (format: data/token_text.py).

    accelerate launch --module scripts.encode_tokens --config configs/demo/tokens.yaml [key=value ...]

Shards are split over the processes, written aside and renamed; run the same command again to go on after a stop.
EXPERIMENT/tokens/tokens.json, written last, has the measured latent scale and the tokenizer's fingerprint.
"""

import io
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from configs.load import exit_on_error, parse_stage_args
from configs.schema import TokensStage
from data.image_text import read_images
from data.tar import expand_shards, write_shard
from data.token_text import TokenTextConfig, read_tokens
from eval.loading import TokensInfo, fingerprint, load_tokenizer
from modeling.image_tokenizer import ImageTokenizer
from modeling.text_encoder import TextEncoder, TextTokenizer, load_text_encoder

SOURCE_FILE = "source.json"  # whose tokens the folder holds, while it is being written
STATISTICS_SAMPLES = 10_000  # the latent scale is measured over so many samples at most


def main(config: TokensStage) -> None:
    """Encode what is not there yet, then measure and write tokens.json."""
    accelerator = Accelerator()
    folder = Path(config.run_dir)
    tokenizer, text_config = load_tokenizer(config.tokenizer_run)
    text_encoder = load_text_encoder(text_config)
    source = {"tokenizer": fingerprint(tokenizer), "text_encoder": fingerprint(text_encoder)}
    outputs = output_paths(expand_shards(config.data.shards), folder)
    if is_complete(folder, source, list(outputs.values())):
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
        info = measure(config, outputs, tokenizer, source)
        info.save(folder)
        (folder / SOURCE_FILE).unlink()
        print(f"{folder}: {info.num_samples} samples, latent scale {info.latent_scale:.4f}", flush=True)
    accelerator.wait_for_everyone()


def output_paths(image_shards: list[str], folder: Path) -> dict[str, Path]:
    """Image shard -> token shard, by file name.

    Raises:
        ValueError: two image shards have the same name.
    """
    outputs = {shard: folder / (Path(shard).name.split(".")[0] + ".tar") for shard in image_shards}
    if len(set(outputs.values())) != len(outputs):
        raise ValueError(f"data.shards has files of the same name in several folders: {', '.join(image_shards)}")
    return outputs


def is_complete(folder: Path, source: dict, outputs: list[Path]) -> bool:
    """True if the folder holds all tokens of this source.

    Raises:
        ValueError: it holds tokens of another tokenizer or text tower.
    """
    if not (folder / "tokens.json").is_file():
        return False
    info = TokensInfo.load(folder)
    if source != {"tokenizer": info.tokenizer_fingerprint, "text_encoder": info.text_encoder_fingerprint}:
        raise ValueError(f"{folder} holds tokens of another tokenizer or text tower: delete it and run this again")
    return all(path.exists() for path in outputs)


def claim_folder(folder: Path, source: dict) -> None:
    """Write down whose tokens go into the folder, so that a continued run can't mix two tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOURCE_FILE
    if path.is_file() and json.loads(path.read_text()) != source:
        raise ValueError(f"{folder} holds unfinished tokens of another tokenizer or text tower: delete it first")
    path.write_text(json.dumps(source))


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


def measure(config: TokensStage, outputs: dict[str, Path], tokenizer: ImageTokenizer, source: dict) -> TokensInfo:
    """Deviation of the sampled latents, and per-channel statistics of the means, from the written shards."""
    shards = TokenTextConfig(shards=[str(path) for path in outputs.values()])
    shape = (tokenizer.config.num_tokens, tokenizer.config.token_channels)
    batches = list(islice(read_tokens(shards, *shape, None, 100), STATISTICS_SAMPLES // 100))
    mean = torch.cat([b["latent_mean"] for b in batches]).double()  # N x K x C
    logvar = torch.cat([b["latent_logvar"] for b in batches]).double()
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    return TokensInfo(
        num_samples=sum(len(b["key"]) for b in read_tokens(shards, *shape, None, 1000)),
        num_tokens=shape[0],
        token_channels=shape[1],
        latent_scale=1 / deviation.item(),
        channel_mean=mean.mean(dim=(0, 1)).tolist(),
        channel_std=mean.std(dim=(0, 1)).tolist(),
        tokenizer_fingerprint=source["tokenizer"],
        text_encoder_fingerprint=source["text_encoder"],
        has_text_states=config.store_text_states,
    )


if __name__ == "__main__":
    stage = parse_stage_args("tokens", __doc__)
    exit_on_error(lambda: main(stage))
