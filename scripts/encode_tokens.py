"""Encode image shards with a trained tokenizer into token shards for stages 2 and 3 (format: data/readers.py).

    accelerate launch --module scripts.encode_tokens --config configs/demo/tokens.yaml [key=value ...]

A sample keeps its text members (captions, JSON); its latents are the posterior's mean and log-variance as float16.
Shards are split over processes and reading workers, written aside and renamed; run the same command again to go on
after a stop. Written last: latent_stats.json with the latent scale, and tokens.json with the tokenizer's fingerprint.
"""

import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

# Run as a file, Python looks into scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.load import parse_stage_args
from data.encoding import build_encoding_loader, encoding_sources
from data.files import write_json
from data.images import ImageTextConfig
from data.readers import TokenTextConfig, token_reader
from data.shards import Source
from data.tar import count_samples, write_shard
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import fingerprint
from modeling.text_encoder import TextEncoder
from training.errors import exit_on_error
from training.loading import find_text_encoder, load_tokenizer
from training.metrics import TimedIterator
from training.run import start_accelerator
from training.stage import StageConfig
from training.supervise import CONTINUE, STOP_SIGNALS, STOPPED_STATUS
from training.tokens import TOKENS_INFO_FILE, LatentStats, TokensInfo
from training.vocabulary import (
    Vocabulary,
    join_vocabularies,
    measure_vocabulary,
    save_vocabulary,
)

SOURCE_FILE = "source.json"  # whose tokens the folder holds, while it is being written
COUNT_SUFFIX = ".count.json"  # beside a token shard, while the others are being written
STATISTICS_SAMPLES = 10_000  # the latent scale is measured over so many samples at most
REPORT_SECONDS = 10.0


@dataclass
class TokensStage(StageConfig):
    """What can be set in tokens.yaml, besides the parts' own fields."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    batch_size: int = 64  # images per pass and process
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # autocast; latents are stored as float16 either way
    )
    flip: bool = False  # also store every image mirrored, as a sample KEY-flip
    num_crops: int = 1  # 1: the centre; more: so many along the longer side, as KEY-crop0, ...
    # Also store the text states (L x T float16 a sample): later stages then never run the text
    # tower. Worth it for small sets seen many times; at ViT-L/14 it costs 118 kB a sample.
    store_text_states: bool = False

    stage = "tokens"

    def check(self) -> None:
        """Refuse impossible numbers, and states of captions that are drawn anew each time."""
        self.data.check()
        for name in ("num_crops", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.store_text_states and self.data.has_several_captions():
            raise ValueError(
                "store_text_states=true stores the states of one caption; with several "
                "(json:captions, recaption_keys) set it to false"
            )

    def image_shards(self) -> list[str]:
        return self.data.all_shards()

    def earlier_runs(self) -> dict[str, str]:
        return {"tokenizer_run": self.tokenizer_run}


def main(config: TokensStage) -> None:
    """Encode what is not there yet, then measure and write tokens.json."""
    accelerator = start_accelerator(config.precision)
    folder = Path(config.run_dir)
    tokenizer = load_tokenizer(config.tokenizer_run)
    text_encoder = find_text_encoder(config.tokenizer_run)
    images = encoding_sources(config.data, tokenizer.config.image_size, config.num_crops)
    outputs = output_paths([image.shards[0] for image in images], folder)
    source = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "text_encoder_fingerprint": text_encoder.identity,
        "has_text_states": config.store_text_states,
        "flip": config.flip,
        "num_crops": config.num_crops,
        "shards": [path.name for path in outputs],
    }
    if is_complete(folder, source):
        accelerator.print(f"{folder}: complete, {len(outputs)} shards, nothing to do")
        return
    if accelerator.is_main_process:
        claim_folder(folder, source)
    accelerator.wait_for_everyone()
    left = [(image, path) for image, path in zip(images, outputs, strict=True) if not path.exists()]
    mine = left[accelerator.process_index :: accelerator.num_processes]
    encoder = Encoder(config, accelerator, tokenizer, text_encoder)
    with stop_requests(folder) as stop_if_asked:
        encode_shards(encoder, mine, stop_if_asked)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        info = describe(outputs, tokenizer, source)
        describe_captions(config, outputs)
        info.save(folder)
        for path in [folder / SOURCE_FILE, *map(count_file, outputs)]:
            path.unlink(missing_ok=True)
        print(
            f"{folder}: {info.num_samples} samples, skipped {info.skipped or 'none'}, latent scale "
            f"{info.latent_scale:.4f} (over {info.stats.num_samples} samples)",
            flush=True,
        )
    accelerator.wait_for_everyone()


@contextmanager
def stop_requests(folder: Path) -> Iterator[Callable[[], None]]:
    """Gives a function that ends the program with STOPPED_STATUS once a signal has asked for it.

    It is called between two batches: an exception of the signal's handler could come up, and get
    lost, anywhere. Processes that are forked inside do not react: a signal to the whole group is
    for this one.
    """
    owner = os.getpid()
    signalled: list[int] = []

    def on_signal(number: int, frame) -> None:
        if os.getpid() == owner:
            signalled.append(number)
            for other in STOP_SIGNALS:  # a second request ends at once; a second warning does not
                again = signal.SIG_IGN if other == signal.SIGUSR1 else signal.SIG_DFL
                signal.signal(other, again)

    def stop_if_asked() -> None:
        if signalled:
            name = signal.Signals(signalled[0]).name
            print(f"{folder}: stopped (signal {name}). {CONTINUE}", flush=True)
            raise SystemExit(STOPPED_STATUS)

    handlers = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield stop_if_asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def output_paths(image_shards: list[str], folder: Path) -> list[Path]:
    """Token shard of each image shard, by file name.

    Raises:
        ValueError: two image shards have the same name.
    """
    names = [Path(shard.split("?")[0]).name.split(" ")[0] for shard in image_shards]
    outputs = [folder / (name.removesuffix(".gz").removesuffix(".tar") + ".tar") for name in names]
    if len(set(outputs)) != len(outputs):
        raise ValueError(
            f"data.shards has files of the same name in several folders: {', '.join(image_shards)}"
        )
    return outputs


def is_complete(folder: Path, source: dict) -> bool:
    """True if the folder holds all tokens of this source.

    Raises:
        ValueError: it holds tokens of another tokenizer, text tower, list of shards or option.
    """
    if not (folder / TOKENS_INFO_FILE).is_file():
        return False
    info = TokensInfo.load(folder)
    check_source(folder, {key: getattr(info, key) for key in source}, source)
    return True


def check_source(folder: Path, found: dict, source: dict) -> None:
    """Refuse to mix what differs."""
    changed = [
        f"{key} was {found.get(key)}, is {value}"
        for key, value in source.items()
        if found.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} holds tokens of another source: {'; '.join(changed)}. Delete it and run this again"
        )


def claim_folder(folder: Path, source: dict) -> None:
    """Write down whose tokens go into the folder, so that a continued run can't mix two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOURCE_FILE
    if path.is_file():
        check_source(folder, json.loads(path.read_text()), source)
    write_json(source, path)


def count_file(token_shard: Path) -> Path:
    """Where the counts of a finished token shard wait for tokens.json."""
    return token_shard.with_name(token_shard.name + COUNT_SUFFIX)


@dataclass
class Encoder:
    """The frozen networks on this process's device: a batch of images in, samples of a token shard out."""

    config: TokensStage
    accelerator: Accelerator
    tokenizer: ImageTokenizer
    text_encoder: TextEncoder

    def __post_init__(self):
        self.tokenizer.to(self.accelerator.device)
        self.text_encoder.to(self.accelerator.device)

    @torch.no_grad()
    def __call__(self, batch: dict) -> Iterator[dict]:
        """{"image": B x V x 3 x R x R uint8, ...} -> B x V samples, twice as many with flip."""
        latents, states = self.latents(batch["image"]), None
        if self.config.store_text_states:
            with self.accelerator.autocast():
                states = to_half(self.text_encoder(batch["token_ids"].to(self.accelerator.device)))
        for index, key in enumerate(batch["key"]):
            text = {"txt": batch["caption"][index].encode()} | batch["members"][index]
            if states is not None:
                text["text.npy"] = states[index]
            for name, latent in latents.items():
                yield {"__key__": key + name, "latent.npy": latent[index], **text}

    def latents(self, images: Tensor) -> dict:
        """View's name ("", "-flip", "-crop0", ...) -> moments B x 2 x K x C, float16."""
        images = images.to(self.accelerator.device, non_blocking=True).float().div_(255)
        names = (
            [""]
            if self.config.num_crops == 1
            else [f"-crop{i}" for i in range(self.config.num_crops)]
        )
        views = dict(zip(names, images.unbind(1), strict=True))
        if self.config.flip:
            views |= {f"{name}-flip": view.flip(-1) for name, view in views.items()}
        with self.accelerator.autocast():
            moments = {
                name: torch.stack([*self.tokenizer.encode(view)], dim=1)
                for name, view in views.items()
            }
        return {name: to_half(values) for name, values in moments.items()}


def to_half(values: Tensor):
    """float16 array on the CPU."""
    return values.to(torch.float16).cpu().numpy()


def encode_shards(
    encoder: Encoder, shards: list[tuple[Source, Path]], stop_if_asked: Callable[[], None]
) -> None:
    """Encode pairs of image and token shard, several at a time in the reading workers; reports rate and time left."""
    if not shards:
        return
    config, rank = encoder.config, encoder.accelerator.process_index
    tokenize = encoder.text_encoder.tokenize if config.store_text_states else None
    sources, pin_memory = [image for image, _ in shards], encoder.accelerator.device.type == "cuda"
    loader = build_encoding_loader(config.data, sources, tokenize, config.batch_size, pin_memory)
    samples: dict[int, list[dict]] = defaultdict(list)
    items, start = TimedIterator(iter(loader)), time.perf_counter()
    reported, waited = start, 0.0
    num_images = num_done = 0
    for item in items:
        stop_if_asked()
        index = item["shard"]
        if "end" not in item:
            num_images += len(item["key"])
            samples[index] += encoder(item)
            continue
        token_shard, made = shards[index][1], samples.pop(index, [])
        words = measure_vocabulary(sample["txt"].decode() for sample in made)
        counts = {"num_samples": len(made), "skipped": item["end"], "vocabulary": asdict(words)}
        write_json(counts, count_file(token_shard))
        write_shard(token_shard, made)
        num_done += 1
        now = time.perf_counter()
        if now - reported > REPORT_SECONDS or num_done == len(shards):
            reported, rate, waited = now, num_images / (now - start), waited + items.take_seconds()
            left = (now - start) / num_done * (len(shards) - num_done)
            progress = f"{num_done}/{len(shards)} shards, {num_images} images, {rate:.1f} images/s, {left:.0f} s left"
            share = f"{waited / (now - start):.1%} of the time waiting for images"
            print(f"[{rank}] {token_shard.parent}: {progress}, {share}", flush=True)


def describe(outputs: list[Path], tokenizer: ImageTokenizer, source: dict) -> TokensInfo:
    """What the folder holds, from the counts of its shards and the first latents."""
    num_samples, skipped = 0, Counter()
    for path in outputs:
        if count_file(path).is_file():
            counts = json.loads(count_file(path).read_text())
            skipped.update(counts["skipped"])
        else:  # of an earlier, complete run whose tokens.json is gone
            counts = {"num_samples": count_samples(path)}
        num_samples += counts["num_samples"]
    config = tokenizer.config
    return TokensInfo(
        num_samples=num_samples,
        num_tokens=config.num_tokens,
        token_channels=config.token_channels,
        skipped=dict(skipped),
        stats=measure(outputs, config.num_tokens, config.token_channels),
        **source,
    )


def describe_captions(config: TokensStage, outputs: list[Path]) -> None:
    """Write the words of the captions, where every epoch has the same captions."""
    files = [count_file(path) for path in outputs]
    if config.data.has_several_captions() or not all(file.is_file() for file in files):
        return
    parts = [json.loads(file.read_text()).get("vocabulary") for file in files]
    if all(parts):
        words = join_vocabularies([Vocabulary(**part) for part in parts])
        save_vocabulary(words, outputs[0].parent)


def measure(outputs: list[Path], num_tokens: int, token_channels: int) -> LatentStats:
    """Deviation of the sampled latents, and per-channel statistics of the means, over the first samples."""
    shards = TokenTextConfig(shards=[str(path) for path in outputs])
    batches = list(
        islice(
            token_reader(shards, num_tokens, token_channels, None).once(100),
            STATISTICS_SAMPLES // 100,
        )
    )
    mean = torch.cat([b["latent_mean"] for b in batches]).double()  # N x K x C
    logvar = torch.cat([b["latent_logvar"] for b in batches]).double()
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    return LatentStats(
        num_samples=len(mean),
        channel_mean=mean.mean(dim=(0, 1)).tolist(),
        channel_std=mean.std(dim=(0, 1)).tolist(),
        latent_scale=1 / deviation.item(),
    )


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TokensStage, __doc__)))
