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
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from configs.load import parse_stage_args
from data.config import ONLY_SOURCE
from data.files import write_json
from data.images import ImageTextConfig, ShardEnd, build_encoding_loader, encoding_sources
from data.readers import TokenTextConfig, token_reader
from data.shards import Source
from data.tar import shard_name, write_shard
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.layers import check_least, fingerprint
from modeling.text_encoder import TextEncoder
from training.checkpoint import BackgroundWriter
from training.errors import STOPPED_STATUS, exit_on_error, printable
from training.loading import find_text_encoder, load_tokenizer
from training.metrics import TimedIterator
from training.provenance import SHARDS, check_source, read_source, save_source, states_by_name
from training.run import TIMEOUT_MINUTES, Run, locked, start_run
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
# of each token shard, in tokens.json
KEPT_COUNTS = ("num_samples", "skipped", "crc32", "bytes")
# beside a token shard, while the others are being written
COUNT_SUFFIX = ".count.json"
# the latent scale is measured over so many samples at most
STATISTICS_SAMPLES = 10_000
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
    tokenizer = load_tokenizer(config.tokenizer_run)
    text_encoder = find_text_encoder(config.tokenizer_run)
    # what the tokens are made of; tokens.json repeats the first part
    source = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "text_encoder_fingerprint": text_encoder.identity,
        "has_text_states": config.store_text_states,
        "flip": config.flip,
        "num_crops": config.num_crops,
    }
    # the number of workers, the batch and the folders of the images decide nothing in them
    made_of = source | {"precision": config.precision, "data": describe_data(config.data)}
    images = []
    not_compared = None
    try:
        images = encoding_sources(config.data, tokenizer.config.image_size, config.num_crops)
    except ValueError as error:
        # whole tokens need their images no more
        if not (run.folder / TOKENS_INFO_FILE).is_file():
            raise
        not_compared = error
    # two shards of one name are a mistake of the config: whole tokens are no excuse for it
    if not not_compared:
        image_shards = [image.shards[0] for image in images]
        outputs = output_paths(image_shards, run.folder)
        source["shards"] = [path.name for path in outputs]
        made_of |= source | {SHARDS: states_by_name(image_shards)}

    if is_complete(run, find_info(run.folder, made_of), made_of, not_compared):
        return
    if not_compared:
        raise not_compared
    with locked(run):
        # once more: another encoding may have ended before the lock was free
        info = find_info(run.folder, made_of)
        if is_complete(run, info, made_of):
            return
        left = [
            (image, path)
            for image, path in zip(images, outputs, strict=True)
            if not is_whole(path, read_counts(path, info))
        ]
        # all have looked before one writes
        run.accelerator.wait_for_everyone()
        if info:
            names = ", ".join(path.name for _, path in left[:NUM_NAMED])
            run.say(f"{run.folder}: {len(left)} shards are lost or damaged, made again: {names}")
        save_source(run.folder, made_of)

        # each process has its share of them; what is there under their names is no shard
        mine = left[run.accelerator.process_index :: run.accelerator.num_processes]
        for _, path in mine:
            path.unlink(missing_ok=True)
            # else a shard whose program is killed before it is counted would pass by old counts
            count_file(path).unlink(missing_ok=True)
        if mine:
            encode_shards(config, run.accelerator, tokenizer, text_encoder, mine)
        run.accelerator.wait_for_everyone()
        if run.is_main:
            finish(run.folder, outputs, info, tokenizer.config, source)
        run.accelerator.wait_for_everyone()


def finish(
    folder: Path,
    outputs: list[Path],
    info: TokensInfo | None,
    sizes: ImageTokenizerConfig,
    source: dict,
) -> None:
    """Write what marks the folder as complete, and say what was skipped; info: the one before."""
    skipped = Counter()
    first = {}
    kept = {}
    vocabulary: Vocabulary | None = join_vocabularies([])
    for path in outputs:
        counts = read_counts(path, info)
        skipped.update(counts["skipped"])
        first = counts.get("first", {}) | first
        kept[path.name] = {name: counts[name] for name in KEPT_COUNTS}
        # Shard by shard: the words of all at once may not fit into memory. Where those of one shard
        # are unknown, nothing can be said of a prompt.
        words = counts.get("vocabulary")
        if vocabulary and words:
            vocabulary = join_vocabularies([vocabulary, Vocabulary(**words)])
        else:
            vocabulary = None
    # of what later stages learn from: tars of other bytes may hold the same
    contents = [counts["crc32"] for counts in kept.values()]
    now = TokensInfo(
        num_samples=sum(counts["num_samples"] for counts in kept.values()),
        num_tokens=sizes.num_tokens,
        token_channels=sizes.token_channels,
        skipped=dict(skipped),
        stats=measure(outputs, sizes.num_tokens, sizes.token_channels),
        identity=hashlib.sha256(repr(contents).encode()).hexdigest()[:16],
        counts=kept,
        **source,
    )
    if vocabulary:
        save_vocabulary(vocabulary, folder)
    now.save(folder)
    # counts, and files that killed processes have not finished
    for path in [*map(count_file, outputs), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)
    print(
        f"{folder}: {now.num_samples} samples, skipped {skipped.total() or 'none'}, latent scale "
        f"{now.latent_scale:.4f} (over {now.stats.num_samples} samples)"
    )
    for reason, sample in first.items():
        print(printable(f"  {reason}: {skipped[reason]}, the first: {sample}"))
    sys.stdout.flush()


def output_paths(image_shards: list[str], folder: Path) -> list[Path]:
    """Token shard of each image shard, by file name; ValueError: two have the same name."""
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


def is_complete(
    run: Run, info: TokensInfo | None, made_of: dict, not_compared: ValueError | None = None
) -> bool:
    """Whether there is nothing to do, and say so; not_compared: why the images were not looked at.

    A folder that is complete may be one that nobody can write to.
    """
    # the main process's look counts: another encoding may end between those of two
    whole = info is not None and not info.damage(run.folder)
    [info] = broadcast_object_list([info if whole else None])
    if info is None:
        return False
    note = f"; not compared with images: {not_compared}" if not_compared else ""
    run.say(f"{run.folder}: complete, {len(info.shards)} shards, nothing to do{note}")
    if not not_compared:
        save_source(run.folder, made_of)
    return True


def find_info(folder: Path, made_of: dict) -> TokensInfo | None:
    """The tokens.json of a folder, checked against what its tokens are made of; None: not there.

    Raises:
        ValueError: its tokens, complete or not, are of another tokenizer, text tower, option or
            image shard.
    """
    # tokens.json is there once all shards are, source.json since the first one
    check_source(folder, read_source(folder), made_of)
    if not (folder / TOKENS_INFO_FILE).is_file():
        return None
    info = TokensInfo.load(folder)
    check_source(folder, asdict(info), made_of)
    return info


def count_file(token_shard: Path) -> Path:
    """Where the counts of a finished token shard wait for tokens.json."""
    return token_shard.with_name(token_shard.name + COUNT_SUFFIX)


def read_counts(token_shard: Path, info: TokensInfo | None) -> dict:
    """What is known of a token shard, as write_tokens or tokens.json has it; {} if nothing."""
    path = count_file(token_shard)
    if path.is_file():
        return json.loads(path.read_text())
    return info.counts.get(token_shard.name, {}) if info else {}


def is_whole(token_shard: Path, counts: dict) -> bool:
    """Whether a token shard is what its counts say; those of an earlier version lack some."""
    return counts.keys() >= {*KEPT_COUNTS} and not shard_damage(token_shard, counts)


def encode_shards(
    config: TokensStage,
    accelerator: Accelerator,
    tokenizer: ImageTokenizer,
    text_encoder: TextEncoder,
    shards: list[tuple[Source, Path]],
) -> None:
    """Encode pairs of image and token shard, several at a time in the reading workers.

    Finished ones are written in the background: the device goes on.

    Raises:
        SystemExit: with STOPPED_STATUS, once a signal has asked for it.
        ChildProcessError: a worker died, or not all of its images arrived.
        OSError: a token shard cannot be written; it is left out as a whole.
    """
    tokenizer.to(accelerator.device)
    text_encoder.to(accelerator.device)
    tokenize = text_encoder.tokenize if config.store_text_states else None
    sources = [image for image, _ in shards]
    on_cuda = accelerator.device.type == "cuda"
    loader = build_encoding_loader(config.data, sources, tokenize, config.batch_size, on_cuda)
    # the workers read images of several shards at once, each in its own order
    samples: dict[int, list[dict]] = defaultdict(list)
    captions: dict[int, list[str]] = defaultdict(list)
    num_images = 0
    num_cut = 0.0
    start = time.perf_counter()
    # one process for all, which have as much to do; no thread of its own: workers are forked
    tqdm.monitor_interval = 0
    bar = {"disable": not accelerator.is_main_process, "mininterval": REPORT_SECONDS}
    with (
        StopRequest() as stop,  # before the workers, so that its signals do not end them
        watched(loader) as batches,
        Watchdog(TIMEOUT_MINUTES, SILENCE) as watchdog,
        BackgroundWriter() as writer,
        tqdm(desc=config.run_dir, total=len(shards), unit=" shards", **bar) as progress,
    ):
        items = TimedIterator(batches)
        for item in items:
            if reason := stop.reason():
                print(f"{config.run_dir}: stopped ({reason}). {CONTINUE}", flush=True)
                raise SystemExit(STOPPED_STATUS)
            watchdog.heartbeat()
            writer.check()
            # a batch of a shard: its samples wait until the shard is through, as it appears whole
            index = item["shard"]
            if "end" not in item:
                num_images += len(item["key"])
                num_cut += len(item["key"]) * float(item.get("captions_cut", 0))
                samples[index] += encode_batch(config, accelerator, tokenizer, text_encoder, item)
                captions[index] += item["caption"]
                continue

            image, token_shard = shards[index]
            made = samples.pop(index, [])
            read = captions.pop(index, [])
            writer.start(partial(write_tokens, config, image, token_shard, made, read, item["end"]))
            waiting = items.seconds / (time.perf_counter() - start)
            cut = f", {num_cut / max(num_images, 1):.1%} of captions cut" if tokenize else ""
            state = f"{num_images} images, {waiting:.1%} of the time waiting for images{cut}"
            progress.set_postfix_str(state, refresh=False)
            progress.update()


@torch.no_grad()
def encode_batch(
    config: TokensStage,
    accelerator: Accelerator,
    tokenizer: ImageTokenizer,
    text_encoder: TextEncoder,
    batch: dict,
) -> Iterator[dict]:
    """{"image": B x V x 3 x R x R uint8, ...} -> B x V samples, twice as many with flip."""
    # bytes travel to the device, four times fewer than floats
    images = batch["image"].to(accelerator.device, non_blocking=True).float().div_(255)
    has_crops = config.num_crops > 1
    views = {f"-crop{i}" if has_crops else "": view for i, view in enumerate(images.unbind(1))}
    if config.flip:
        views |= {f"{name}-flip": view.flip(-1) for name, view in views.items()}
    states = None
    with accelerator.autocast():
        moments = {name: tokenizer.encode(view) for name, view in views.items()}
        if config.store_text_states:
            states = to_half(text_encoder(batch["token_ids"].to(accelerator.device)))
    # name of the view -> mean and logvar, B x 2 x K x C
    latents = {name: to_half(torch.stack([*found], dim=1)) for name, found in moments.items()}
    for index, key in enumerate(batch["key"]):
        text = {"txt": batch["caption"][index].encode()} | batch["members"][index]
        if states is not None:
            text["text.npy"] = states[index]
        for name, latent in latents.items():
            yield {"__key__": key + name, "latent.npy": latent[index], **text}


def to_half(values: Tensor) -> np.ndarray:
    """float16 array on the CPU."""
    return values.to(torch.float16).cpu().numpy()


def write_tokens(
    config: TokensStage,
    image: Source,
    token_shard: Path,
    made: list[dict],
    captions: list[str],
    end: ShardEnd,
) -> None:
    """Write a token shard, then its counts, a sign that it is whole.

    captions: those that were read; a sample's own txt may be another text, or in another encoding.

    Raises:
        ChildProcessError: not all images arrived.
    """
    # what a worker lost on the way would be missing without an error
    if len(captions) != end.num_images:
        raise ChildProcessError(
            f"{token_shard} is not written: of the {end.num_images} images that a data worker read "
            f"of {image.shards[0]}, {len(captions)} arrived"
        )
    # of captions that are drawn anew, an epoch may have others than these
    vocabulary = None
    if not config.data.has_several_captions():
        vocabulary = asdict(measure_vocabulary(captions))
    write_shard(token_shard, made)
    counts = {
        "num_samples": len(made),
        "skipped": end.skipped,
        "first": end.first,
        "vocabulary": vocabulary,
        "crc32": content_crc32(made),
        "bytes": token_shard.stat().st_size,
    }
    write_json(counts, count_file(token_shard))


def content_crc32(samples: Iterable[dict]) -> int:
    """Of all keys, arrays and texts of a token shard, in order: what later stages learn from."""
    value = 0
    for sample in samples:
        for name, part in sample.items():
            if isinstance(part, np.ndarray):
                part = part.tobytes()
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
    # a sampled latent is mean + sqrt(exp(logvar)) * noise: its variances add up
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    return LatentStats(
        num_samples=len(mean),
        channel_mean=mean.mean(dim=(0, 1)).tolist(),
        channel_std=mean.std(dim=(0, 1)).tolist(),
        latent_scale=1 / deviation.item(),
    )


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_stage_args(TokensStage, __doc__)))
