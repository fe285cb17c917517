"""Encode image shards with a trained tokenizer into token shards for stages 2 and 3.

    accelerate launch --module scripts.encode_tokens --config configs/emoji/tokens.yaml [key=value]

A sample keeps its text members (captions, JSON); its latents are the posterior's mean and
log-variance as float16 (format: data/readers.py). Shards are split over processes and reading
workers, written aside and renamed; after a stop, the same command continues, and token shards that
are lost or cut short are made again. source.json says what the tokens are made of, so that image
shards that were made anew are refused. Written last:
vocabulary.json with the captions' words, latent_stats.json with the latent scale, and tokens.json
with the tokenizer's fingerprint.
"""

import hashlib
import io
import json
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import parse_stage_args
from data.config import ONLY_SOURCE
from data.files import write_json
from data.images import ImageTextConfig, build_encoding_loader, encoding_sources
from data.readers import TokenTextConfig, token_reader
from data.shards import Source
from data.tar import read_shard, shard_name, write_shard
from modeling.image_tokenizer import ImageTokenizer
from modeling.layers import check_least, fingerprint
from modeling.text_encoder import TextEncoder
from training.checkpoint import BackgroundWriter
from training.errors import STOPPED_STATUS, exit_on_error, printable
from training.loading import find_text_encoder, load_tokenizer
from training.metrics import TimedIterator
from training.provenance import SHARDS, check_source, read_source, save_source, states_by_name
from training.run import TIMEOUT_MINUTES, locked, start_run
from training.stage import StageConfig
from training.supervise import CONTINUE, StopRequest, Watchdog, watched
from training.tokens import TOKENS_INFO_FILE, LatentStats, TokensInfo, shard_damage
from training.vocabulary import (
    Vocabulary,
    join_vocabularies,
    measure_vocabulary,
    save_vocabulary,
)

NUM_NAMED = 3  # token shards that are made again
KEPT_COUNTS = ("num_samples", "skipped", "crc32", "bytes")  # of each token shard, in tokens.json
COUNT_SUFFIX = ".count.json"  # beside a token shard, while the others are being written
STATISTICS_SAMPLES = 10_000  # the latent scale is measured over so many samples at most
REPORT_SECONDS = 10.0
SILENCE = f"no images encoded for {TIMEOUT_MINUTES:g} minutes"


@dataclass
class TokensStage(StageConfig):
    """What can be set in tokens.yaml, besides the parts' own fields."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    batch_size: int = 64  # images per pass and process
    # autocast; latents are stored as float16 either way
    precision: Literal["fp32", "bf16"] = "fp32"
    flip: bool = False  # also store every image mirrored, as a sample KEY-flip
    num_crops: int = 1  # 1: the centre; more: so many along the longer side, as KEY-crop0, ...
    # Also store the text states (L x T float16 a sample): later stages then never run the text
    # tower. Worth it for small sets seen many times; at ViT-L/14 it costs 118 kB a sample.
    store_text_states: bool = False

    stage = "tokens"

    def check(self) -> None:
        """Refuse impossible numbers, and states of captions that are drawn anew each time."""
        super().check()
        check_least(self, 1, "num_crops", "batch_size")
        if self.store_text_states and self.data.has_several_captions():
            raise ValueError(
                "store_text_states=true stores the states of one caption; with several "
                "(json:captions, recaption_keys, captions.window=sentences) set it to false"
            )

    def image_shards(self) -> list[str]:
        return self.data.all_shards()


def main(config: TokensStage) -> None:
    """Encode what is not there yet, then measure and write tokens.json."""
    run = start_run(config.run_dir, config.precision, seed=0)
    accelerator, folder = run.accelerator, run.folder
    tokenizer = load_tokenizer(config.tokenizer_run)
    text_encoder = find_text_encoder(config.tokenizer_run)
    source = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "text_encoder_fingerprint": text_encoder.identity,
        "has_text_states": config.store_text_states,
        "flip": config.flip,
        "num_crops": config.num_crops,
    }
    made_of = source | {"precision": config.precision, "data": describe_data(config.data)}
    try:
        images = encoding_sources(config.data, tokenizer.config.image_size, config.num_crops)
    except ValueError as error:
        # Whole tokens need their images no more
        info = find_info(folder, made_of)
        if info is None or info.damage(folder):
            raise
        accelerator.print(f"{folder}: complete, nothing to do; not compared with images: {error}")
        return
    image_shards = [image.shards[0] for image in images]
    outputs = output_paths(image_shards, folder)

    # What the tokens are made of; tokens.json repeats the first part.
    source["shards"] = [path.name for path in outputs]
    made_of |= source | {SHARDS: states_by_name(image_shards)}
    info = find_info(folder, made_of)
    left = [
        (image, path)
        for image, path in zip(images, outputs, strict=True)
        if shard_damage(path, read_counts(path, info))
    ]
    accelerator.wait_for_everyone()  # all have looked before one writes
    if info and not left:
        save_source(folder, made_of)
        accelerator.print(f"{folder}: complete, {len(outputs)} shards, nothing to do")
        return
    if info:
        names = ", ".join(path.name for _, path in left[:NUM_NAMED])
        accelerator.print(f"{folder}: {len(left)} shards are lost or damaged, made again: {names}")

    with locked(run):
        save_source(folder, made_of)
        # This process's share
        mine = left[accelerator.process_index :: accelerator.num_processes]
        for _, path in mine:
            path.unlink(missing_ok=True)  # what is there is no shard
        encoder = Encoder(config, accelerator, tokenizer, text_encoder)
        encode_shards(encoder, mine)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(folder, outputs, info, tokenizer, source)
        accelerator.wait_for_everyone()


def finish(
    folder: Path,
    outputs: list[Path],
    info: TokensInfo | None,
    tokenizer: ImageTokenizer,
    source: dict,
) -> None:
    """Write what marks the folder as complete, and say what was skipped; info: the one before."""
    skipped, first, num_samples, kept = Counter(), {}, 0, {}
    vocabulary: Vocabulary | None = join_vocabularies([])
    for path in outputs:
        counts = complete_counts(path, read_counts(path, info))
        num_samples += counts["num_samples"]
        skipped.update(counts["skipped"])
        first = counts["first"] | first
        kept[path.name] = {name: counts[name] for name in KEPT_COUNTS}
        # Shard by shard: the words of all at once may not fit into memory. Where those of one shard
        # are unknown, nothing can be said of a prompt.
        words = counts["vocabulary"]
        if vocabulary and words:
            vocabulary = join_vocabularies([vocabulary, Vocabulary(**words)])
        else:
            vocabulary = None
    contents = [counts["crc32"] for counts in kept.values()]
    sizes = tokenizer.config
    stats = measure(outputs, sizes.num_tokens, sizes.token_channels)
    now = TokensInfo(
        num_samples=num_samples,
        num_tokens=sizes.num_tokens,
        token_channels=sizes.token_channels,
        skipped=dict(skipped),
        stats=stats,
        identity=hashlib.sha256(repr(contents).encode()).hexdigest()[:16],
        counts=kept,
        **source,
    )
    if vocabulary:
        save_vocabulary(vocabulary, folder)
    now.save(folder)
    # Counts, and files that killed processes have not finished
    for path in [*map(count_file, outputs), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)
    print(
        f"{folder}: {num_samples} samples, skipped {skipped.total() or 'none'}, latent scale "
        f"{now.latent_scale:.4f} (over {stats.num_samples} samples)"
    )
    for reason, sample in first.items():
        print(printable(f"  {reason}: {skipped[reason]}, the first: {sample}"))
    sys.stdout.flush()


def output_paths(image_shards: list[str], folder: Path) -> list[Path]:
    """Token shard of each image shard, by file name.

    Raises:
        ValueError: two image shards have the same name.
    """
    names = map(shard_name, image_shards)
    outputs = [folder / (name.removesuffix(".gz").removesuffix(".tar") + ".tar") for name in names]
    if len(set(outputs)) != len(outputs):
        raise ValueError(
            f"data.shards has files of the same name in several folders: {', '.join(image_shards)}"
        )
    return outputs


def describe_data(data: ImageTextConfig) -> dict:
    """What of a config decides which samples a token shard holds, and with which text."""
    sources = {
        name: {"captions": asdict(source.captions), "filters": asdict(source.filters)}
        for name, source in data.full_sources().items()
    }
    parts = sources.get(ONLY_SOURCE, {"sources": sources})
    return {"background": list(data.background), **parts}


def find_info(folder: Path, made_of: dict) -> TokensInfo | None:
    """What a folder holds that was complete once, checked against what its tokens are made of.

    Raises:
        ValueError: its tokens, complete or not, are of another tokenizer, text tower, option or
            image shard.
    """
    check_source(folder, read_source(folder), made_of)
    if not (folder / TOKENS_INFO_FILE).is_file():
        return None
    info = TokensInfo.load(folder)
    check_source(folder, asdict(info), made_of)
    return info


def count_file(token_shard: Path) -> Path:
    """Where the counts of a finished token shard wait for tokens.json."""
    return token_shard.with_name(token_shard.name + COUNT_SUFFIX)


@dataclass
class Encoder:
    """The frozen networks on this process's device: images in, samples of a token shard out."""

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
        num_crops = self.config.num_crops
        names = [f"-crop{i}" for i in range(num_crops)] if num_crops > 1 else [""]
        views = dict(zip(names, images.unbind(1), strict=True))
        if self.config.flip:
            views |= {f"{name}-flip": view.flip(-1) for name, view in views.items()}
        with self.accelerator.autocast():
            found = {name: self.tokenizer.encode(view) for name, view in views.items()}
        return {name: to_half(torch.stack([*moments], dim=1)) for name, moments in found.items()}


def to_half(values: Tensor):
    """float16 array on the CPU."""
    return values.to(torch.float16).cpu().numpy()


def encode_shards(encoder: Encoder, shards: list[tuple[Source, Path]]) -> None:
    """Encode pairs of image and token shard, several at a time in the reading workers.

    Finished ones are written in the background: the device goes on.

    Raises:
        SystemExit: with STOPPED_STATUS, once a signal has asked for it.
        ChildProcessError: a worker died, or not all of its images arrived.
        OSError: a token shard cannot be written; it is left out as a whole.
    """
    if not shards:
        return
    # The workers read images of several shards at once, each in its own order.
    config, rank = encoder.config, encoder.accelerator.process_index
    tokenize = encoder.text_encoder.tokenize if config.store_text_states else None
    sources, pin_memory = [image for image, _ in shards], encoder.accelerator.device.type == "cuda"
    loader = build_encoding_loader(config.data, sources, tokenize, config.batch_size, pin_memory)
    samples: dict[int, list[dict]] = defaultdict(list)
    captions: dict[int, list[str]] = defaultdict(list)
    arrived: Counter[int] = Counter()
    with (
        StopRequest() as stop,  # before the workers, so that its signals do not end them
        watched(loader) as batches,
        Watchdog(TIMEOUT_MINUTES, SILENCE) as watchdog,
        BackgroundWriter() as writer,
    ):
        items = TimedIterator(batches)
        progress = Progress(rank, len(shards), items, reads_text=tokenize is not None)
        for item in items:
            if reason := stop.reason():
                print(f"{config.run_dir}: stopped ({reason}). {CONTINUE}", flush=True)
                raise SystemExit(STOPPED_STATUS)
            watchdog.heartbeat()
            writer.check()
            # a batch of a shard: its samples wait until the shard is through
            index = item["shard"]
            image, token_shard = shards[index]
            if "end" not in item:
                arrived[index] += len(item["key"])
                progress.num_images += len(item["key"])
                progress.num_cut += len(item["key"]) * float(item.get("captions_cut", 0))
                samples[index] += encoder(item)
                captions[index] += item["caption"]
                continue

            # A shard is through. What a worker lost on the way would be missing without an error.
            end, made = item["end"], samples.pop(index, [])
            if arrived[index] != end.num_images:
                raise ChildProcessError(
                    f"{token_shard} is not written: of the {end.num_images} images that a data "
                    f"worker read of {image.shards[0]}, {arrived[index]} arrived"
                )
            counts = {"num_samples": len(made), "skipped": end.skipped, "first": end.first}
            read = captions.pop(index, [])
            writer.start(partial(write_tokens, config, token_shard, made, read, counts))
            progress.report(token_shard.parent)


def write_tokens(
    config: TokensStage, token_shard: Path, made: list[dict], captions: list[str], counts: dict
) -> None:
    """Write a token shard and, before and after, its counts; captions: those that were read.

    A sample's own txt may be another text, or in another encoding.
    """
    counts |= {"vocabulary": None, "crc32": content_crc32(made)}
    if not config.data.has_several_captions():  # an epoch may have others
        counts["vocabulary"] = asdict(measure_vocabulary(captions))
    write_json(counts, count_file(token_shard))
    write_shard(token_shard, made)
    counts["bytes"] = token_shard.stat().st_size
    write_json(counts, count_file(token_shard))


class Progress:
    """Says how far the shards of a process are, and whether the network waits for images."""

    def __init__(self, rank: int, num_shards: int, items: TimedIterator, reads_text: bool):
        self.rank = rank
        self.num_shards = num_shards
        self.items = items
        self.num_done = self.num_images = 0
        self.reads_text = reads_text
        self.num_cut = 0.0  # captions that the text tower cuts
        self.start = self.reported = time.perf_counter()

    def report(self, folder: Path) -> None:
        """Count a shard; print a line now and then, and after the last one."""
        self.num_done += 1
        now = time.perf_counter()
        if now - self.reported <= REPORT_SECONDS and self.num_done < self.num_shards:
            return
        self.reported = now
        seconds = now - self.start
        share = self.num_cut / max(self.num_images, 1)
        cut = f", {share:.1%} of captions cut by the text tower" if self.reads_text else ""
        left = seconds / self.num_done * (self.num_shards - self.num_done)
        print(
            f"[{self.rank}] {folder}: {self.num_done}/{self.num_shards} shards, {self.num_images} "
            f"images, {self.num_images / seconds:.1f} images/s, {left:.0f} s left, "
            f"{self.items.seconds / seconds:.1%} of the time waiting for images{cut}",
            flush=True,
        )


def read_counts(token_shard: Path, info: TokensInfo | None) -> dict:
    """What is known of a token shard: KEPT_COUNTS, "first" and "vocabulary", as far as they are."""
    path = count_file(token_shard)
    if path.is_file():
        return json.loads(path.read_text())
    return info.counts.get(token_shard.name, {}) if info else {}


def complete_counts(token_shard: Path, counts: dict) -> dict:
    """The counts of a token shard; what is not known of an older one is read from it."""
    if "crc32" not in counts:
        samples = list(read_shard(token_shard))
        counts = counts | {"num_samples": len(samples), "crc32": content_crc32(samples)}
    unknown = {"skipped": {}, "first": {}, "vocabulary": None}
    return unknown | {"bytes": token_shard.stat().st_size} | counts


def content_crc32(samples: Iterable[dict]) -> int:
    """Of all keys, arrays and texts of a token shard, in order: what later stages learn from."""
    value = 0
    for sample in samples:
        for name, part in sample.items():
            if name.endswith(".npy"):
                array = np.load(io.BytesIO(part)) if isinstance(part, bytes) else part
                part = np.ascontiguousarray(array).tobytes()
            data = part.encode() if isinstance(part, str) else part
            value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


def measure(outputs: list[Path], num_tokens: int, token_channels: int) -> LatentStats:
    """Deviation of the sampled latents, per-channel statistics of the means; the first samples."""
    shards = TokenTextConfig(shards=[str(path) for path in outputs])
    reader = token_reader(shards, num_tokens, token_channels, None)
    batches = [*reader.once(100, limit=STATISTICS_SAMPLES)]
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
