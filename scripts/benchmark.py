"""Measure the parts of training and sampling on this machine.

    python scripts/benchmark.py train --config configs/flowtok_b/flowtok.yaml [key=value ...] [--batch-size 16]
        [--baseline] [--text-tower]
    python scripts/benchmark.py sample --config configs/flowtok_b/flowtok.yaml [key=value ...] [--baseline]
    python scripts/benchmark.py tokenizer --config configs/tokenizer_bl77_256/tokenizer.yaml [key=value ...]
    python scripts/benchmark.py text [--config ...]            the frozen text tower
    python scripts/benchmark.py growth [--config ...]          time against batch, tokens and depth
    python scripts/benchmark.py memory --config configs/flowtok_h/flowtok.yaml     what is kept for the backward pass
    python scripts/benchmark.py all [--only PART ...]          all of the above, for the table of the README
    python scripts/benchmark.py data configs/demo/tokenizer.yaml [key=value ...] [--seconds 20] [--consume 500]
    python scripts/benchmark.py readers

Each takes --json (one object). All but the last two need no data and no weights, which are made up, and take --seconds
(length of each measurement), --repeats (rounds) and --precision (default: fp32 on the CPU, the config's on a GPU). They
run the programs' own code (benchmark_training.py, benchmark_sampling.py), and give samples/s, peak memory, time by part
and the share: useful FLOPs by time, by the rate of torch.mm measured in turn in the same dtype. A range is that of the
rounds. --baseline times the plain way of the same maths (benchmark_plain.py) in the same rounds. memory counts tensors
instead, in the config's precision. On a CPU under Linux, malloc keeps freed memory, as where train_flowtok.sh trains.
data: how fast a stage's reader gives batches: samples/s, per worker, MB/s of shards; with --consume RATE also the share
of the time that a training of RATE samples/s waits for it (`samples_per_second` in the run's metrics.jsonl).
readers: decoding of photos against Pillow + torchvision, token shards against webdataset; made-up data, one thread.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

import torch
from configs.schema import StageConfig, TextEncoderStage, TokenizerStage

from configs.cli import exit_on_error
from configs.load import load_config
from data.readers import ImageTextConfig, image_reader, token_reader
from data.storage import is_remote
from data.tar import count_samples, expand_shards
from modeling.text_encoder import TextTokenizer, clip_tokenizer
from scripts.benchmark_flops import measure_memory
from scripts.benchmark_growth import measure_growth
from scripts.benchmark_readers import compare_readers
from scripts.benchmark_report import about, measure_all, show
from scripts.benchmark_sampling import measure_sampling, measure_text, measure_tokenizer
from scripts.benchmark_timing import start_again_keeping_memory
from scripts.benchmark_training import measure_training

ROOT = Path(__file__).resolve().parents[1]
FLOWTOK_B, FLOWTOK_H = (ROOT / f"configs/flowtok_{size}/flowtok.yaml" for size in "bh")
TOKENIZER = ROOT / "configs/tokenizer_bl77_256/tokenizer.yaml"
# part -> (what it measures, default config, default batch size; None: it has its own)
NETWORKS = {
    "train": (measure_training, FLOWTOK_B, 16),
    "sample": (measure_sampling, FLOWTOK_B, 16),
    "tokenizer": (measure_tokenizer, TOKENIZER, 8),
    "text": (measure_text, FLOWTOK_B, 16),
    "growth": (measure_growth, FLOWTOK_B, None),
    "memory": (measure_memory, FLOWTOK_H, None),
}
WARM_UP_BATCHES = 4  # workers start and fill their first block
COUNTED_SHARDS = 4  # whose bytes per sample stand for all


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    networks = {name: parts.add_parser(name) for name in (*NETWORKS, "all")}
    for name, part in networks.items():
        seconds, rounds = (10.0, 3) if name == "all" else (30.0, 5)
        part.add_argument(
            "--seconds",
            type=float,
            default=seconds,
            help="of each measurement (default: %(default)s)",
        )
        part.add_argument(
            "--repeats", type=int, default=rounds, help="its rounds (default: %(default)s)"
        )
        part.add_argument(
            "--precision",
            choices=["fp32", "bf16"],
            help="default: fp32 on the CPU, else the config's",
        )
        if name in NETWORKS:
            _, config, batch_size = NETWORKS[name]
            part.add_argument(
                "--config", default=str(config), help="YAML file (default: %(default)s)"
            )
            part.add_argument("overrides", nargs="*", metavar="key=value")
            if batch_size is not None:
                part.add_argument("--batch-size", type=int, default=batch_size)
        if name == "all":
            part.add_argument(
                "--only", nargs="+", choices=[*NETWORKS], metavar="PART", help="some of them"
            )
        if name in ("train", "sample"):
            part.add_argument(
                "--baseline", action="store_true", help="also time the plain way of the same maths"
            )
    networks["train"].add_argument(
        "--text-tower", action="store_true", help="run the text tower in each step"
    )
    networks["tokenizer"].set_defaults(baseline=False, text_tower=False)
    data = parts.add_parser("data", help="a stage's reader")
    data.add_argument("config", help="YAML file of a stage that trains")
    data.add_argument("overrides", nargs="*", metavar="key=value")
    data.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")
    data.add_argument(
        "--consume", type=float, metavar="RATE", help="samples/s that the training takes"
    )
    readers = parts.add_parser("readers", help="our readers and the plain ways, side by side")
    for part in (*networks.values(), data, readers):
        part.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def benchmark_networks(args: argparse.Namespace) -> dict:
    """One part of NETWORKS.

    Raises:
        ValueError: a bad config or number, or a stage that the part does not measure.
    """
    for name in ("batch_size", "repeats"):
        if getattr(args, name, 1) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    is_timed_on_cpu = args.part != "memory" and not torch.cuda.is_available()
    precision = args.precision or ("fp32" if is_timed_on_cpu else None)
    stage = load_config(args.config, args.overrides)
    if not hasattr(stage, "training"):
        raise ValueError(
            f"{args.config}: stage {stage.stage!r} does not train; choose a stage that does"
        )
    own = ["training.gradient_accumulation=1"]
    own += [f"training.batch_size={args.batch_size}"] if hasattr(args, "batch_size") else []
    for group in ("training", "sampling"):
        own += [f"{group}.precision={precision}"] if precision and hasattr(stage, group) else []
    overrides = [*own, *args.overrides]
    config = load_config(args.config, overrides)
    measure, *_ = NETWORKS[args.part]
    return {"part": args.part, "config": args.config, "overrides": overrides} | measure(
        config, Path(args.config), args
    )


def build_loader(config: StageConfig):
    """The reader of one process of a stage, as its training builds it, without the frozen networks.

    Raises:
        ValueError: a stage that does not train.
    """
    training = getattr(config, "training", None)
    if training is None:
        raise ValueError(
            f"stage {config.stage!r} has no training reader; choose a stage that trains"
        )
    batch_size, seed = training.batch_size, training.seed
    if isinstance(config.data, ImageTextConfig):
        if isinstance(config, TokenizerStage):
            size, guided = config.tokenizer.image_size, config.tokenizer.text_guidance
            tokenize = text_tokenizer(config) if guided else None
        elif isinstance(config, TextEncoderStage):
            size, tokenize = config.clip.image_size, clip_tokenizer(config.clip.context_length)
        return image_reader(config.data, size, tokenize).stream(batch_size, seed)
    shape = config.projector.text_tokens, config.projector.token_channels
    return token_reader(config.data, *shape, text_tokenizer(config)).stream(batch_size, seed)


def text_tokenizer(config: StageConfig):
    """The run's own tokenizer; CLIP's at the configured length where the small tower is not trained yet."""
    model = config.text_encoder.model
    if model.startswith("local-dir:") and not Path(model.removeprefix("local-dir:")).is_dir():
        part = getattr(config, "tokenizer", None) or config.projector
        return clip_tokenizer(part.text_tokens)
    return TextTokenizer(config.text_encoder)


def bytes_per_sample(config: StageConfig) -> float:
    """Size of the first local shards on disk over their samples; 0 if all are remote."""
    shards = expand_shards(config.data.all_shards())
    local = [path for path in shards if not is_remote(path)][:COUNTED_SHARDS]
    samples = sum(map(count_samples, local))
    return sum(map(os.path.getsize, local)) / samples if samples else 0.0


def measure(loader, seconds: float, consume: float | None, batch_size: int) -> dict[str, float]:
    """Read for so long, at full speed or as a training that takes `consume` samples/s; rate and share of waiting."""
    batches = iter(loader)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    start, waited, count = time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) - start < seconds or not count:
        next(batches)
        waited += time.perf_counter() - now
        count += 1
        if consume:
            time.sleep(batch_size / consume)
    elapsed = time.perf_counter() - start
    return {"samples_per_second": count * batch_size / elapsed, "wait_share": waited / elapsed}


def benchmark_data(args: argparse.Namespace) -> dict:
    """Figures of a stage's reader."""
    config = load_config(args.config, args.overrides)
    loader = build_loader(config)
    batch_size, workers = config.training.batch_size, config.data.num_workers
    rate = measure(loader, args.seconds, None, batch_size)["samples_per_second"]
    result = {
        "config": args.config,
        "num_workers": workers,
        "batch_size": batch_size,
        "samples_per_second": rate,
        "samples_per_second_per_worker": rate / max(workers, 1),
        "megabytes_per_second": rate * bytes_per_sample(config) / 1e6,
        "cpu_count": os.cpu_count(),
    }
    if args.consume:
        paced = measure(build_loader(config), args.seconds, args.consume, batch_size)
        result |= {"consumed_samples_per_second": args.consume, "wait_share": paced["wait_share"]}
    return result


def show_readers(result: dict) -> None:
    """Print the comparisons."""
    for content, row in result["images"].items():
        print(
            f"photos, {content}: {row['fast_images_per_second']:.0f} images/s, {row['fast_over_plain']:.2f} times the "
            f"plain way, difference {row['mean_difference_255ths']:.2f}/255"
        )
    tokens = result["tokens"]
    print(
        f"tokens: {tokens['samples_per_second']:.0f} samples/s, {tokens['over_webdataset']:.2f} times webdataset's"
    )


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.part in NETWORKS:
        result = benchmark_networks(args) | about(args)
    elif args.part == "all":
        result = measure_all(args) | about(args)
    else:
        result = compare_readers() if args.part == "readers" else benchmark_data(args)
    if args.json:
        print(json.dumps(result))
    elif args.part == "readers":
        show_readers(result)
    elif args.part == "data":
        show_data(args, result)
    else:
        show(result)


def show_data(args: argparse.Namespace, result: dict) -> None:
    """Print the figures of a stage's reader."""
    print(
        f"{result['config']}: {result['samples_per_second']:.0f} samples/s with {result['num_workers']} workers on "
        f"{result['cpu_count']} cores ({result['samples_per_second_per_worker']:.0f} a worker, "
        f"{result['megabytes_per_second']:.1f} MB/s of shards)"
    )
    if args.consume:
        print(
            f"a training that takes {args.consume:g} samples/s waits {100 * result['wait_share']:.1f}% of its time"
        )


if __name__ == "__main__":
    arguments = parse_args()
    start_again_keeping_memory()
    exit_on_error(lambda: main(arguments))
