"""How fast training, sampling and encoding are on this machine.

    python scripts/benchmark.py train --config configs/flowtok_b/flowtok.yaml --batch-size 16
    python scripts/benchmark.py sample --config configs/flowtok_b/flowtok.yaml sampling.steps=4
    python scripts/benchmark.py encode --config configs/tokenizer_bl77_256/tokenizer.yaml
    python scripts/benchmark.py readers

train: the optimiser step of any stage with its EMA, on stored text states. sample: the parts of an
image, and a single one's flow. encode: a tokenizer's images to latents, back, and captions to text
states. These run the programs' own code on made-up batches with random weights, need no data, and
are in float32 on a CPU. readers: made-up shards of photos and of tokens, read by one process.

A machine's speed changes while one measures, so everything is timed in rounds, right after
torch.mm. A share is FLOPs, those of recomputation included, by time, by the best rate of torch.mm.
Figures are medians with the range of the rounds. On a CPU, malloc should keep what is freed, as
where train_flowtok.sh trains: set the MALLOC_ variables of its header.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

# Run as a file, Python looks for modules in scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, token_reader
from data.tar import write_shard
from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import ImageGenerator
from scripts.workload import Stage, build_tower, build_workload, captions, images, read_stage
from training.errors import exit_on_error
from training.optim import EMA
from training.run import Run, start_run

ROOT = Path(__file__).resolve().parents[1]
FLOWTOK_B = ROOT / "configs/flowtok_b/flowtok.yaml"
TOKENIZER = ROOT / "configs/tokenizer_bl77_256/tokenizer.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MM_SIZES = {"cpu": (1024, 1536, 2048), "cuda": (4096, 6144, 8192)}  # of square matrices
MM_SECONDS = 0.2  # for each of them
PHOTOS, TOKENS = 48, 4000  # samples of the made-up shards


# Timing


@dataclass
class Way:
    """Something to time."""

    call: Callable[[], Any]
    samples: int  # of a call


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Mean over calls for about so long, one at least."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    more = int(seconds / (time.perf_counter() - start))
    for _ in range(more):
        call()
    wait(device)
    return (time.perf_counter() - start) / (1 + more)


def mm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm now: the best of a few large sizes."""
    rates = []
    for size in MM_SIZES[device.type]:
        square = torch.randn(size, size, device=device, dtype=dtype)
        seconds = seconds_per_call(lambda x=square: torch.mm(x, x), device, MM_SECONDS)
        rates.append(2 * size**3 / seconds)
    return max(rates)


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_ways(
    ways: dict[str, Way], device: torch.device, precision: str, seconds: float, rounds: int
) -> dict[str, dict]:
    """Figures of each way, all timed in each round for seconds / rounds."""
    # The first call also pays for allocations and the optimiser's moments.
    flops = {name: count_flops(way.call) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            peaks[name].append(mm_rate(device, DTYPES[precision]))
            times[name].append(seconds_per_call(way.call, device, seconds / rounds))
    return {
        name: {
            "samples_per_second": spread([way.samples / t for t in times[name]]),
            "share_of_mm": spread(
                [flops[name] / t / peak for t, peak in zip(times[name], peaks[name], strict=True)]
            ),
            "gflop_per_sample": flops[name] / way.samples / 1e9,
            "mm_gflop_per_second": median(peaks[name]) / 1e9,
        }
        for name, way in ways.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "low": min(values), "high": max(values)}


# What is timed


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Random values for the weights that start at zero, as gates and last layers do."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def start(args: argparse.Namespace, section: str = "training") -> tuple[Stage, Run]:
    """The stage of --config, in the precision of one of its sections or, on a CPU, in float32."""
    own = [] if torch.cuda.is_available() else [f"{section}.precision=fp32"]
    stage = read_stage(args.config, [*own, *args.overrides])
    return stage, start_run("", getattr(stage.config, section).precision, seed=0)


def measure_training(args: argparse.Namespace) -> dict:
    """The step of a stage, its EMA included."""
    stage, run = start(args)
    work = build_workload(stage, run, stored_states=not args.text_tower)
    for network in work.networks.values():
        fill_zeros(network.module)
    ema = EMA(work.networks[""].module, stage.training.ema_decay)
    batch = work.make_batch(args.batch_size)
    steps = count()

    def step() -> None:
        work.step([batch], next(steps))
        ema.update()

    ways = {"train": Way(step, args.batch_size)}
    return time_ways(ways, run.device, stage.precision, args.seconds, args.rounds)


def measure_sampling(args: argparse.Namespace) -> dict:
    """The parts of an image, from token ids to pixels."""
    stage, run = start(args, "sampling")
    config, device, number = stage.config, run.device, args.batch_size
    sampling, indices = config.sampling, list(range(args.batch_size))

    # Random weights, none of them zero.
    tokenizer = ImageTokenizer(stage.tokenizer)
    flow = build_flow(config.projector, config.flowtok, config.flow)
    for module in (tokenizer, flow):
        fill_zeros(module)
        module.requires_grad_(False).eval().to(device)
    parts = ImageGenerator(build_tower(stage.clip).to(device), tokenizer, flow)

    # What each part hands to the next.
    token_ids = captions(stage.tokenizer.text_tokens, number)["token_ids"].to(device)
    states = parts.text_encoder(token_ids)
    starts = parts.start(states, sampling, seed=0, indices=indices)
    ends = parts.transport(starts, states, sampling)
    ways = {
        "text": Way(lambda: parts.text_encoder(token_ids), number),
        "projector": Way(lambda: parts.start(states, sampling, 0, indices), number),
        "flow": Way(lambda: parts.transport(starts, states, sampling), number),
        "flow_of_one": Way(lambda: parts.transport(starts[:1], states[:1], sampling), 1),
        "decode": Way(lambda: parts.decode(ends, states, sampling.precision), number),
    }
    return time_ways(ways, device, sampling.precision, args.seconds, args.rounds)


def measure_encoding(args: argparse.Namespace) -> dict:
    """What scripts/encode_tokens.py does with a batch, and the way back."""
    stage, run = start(args)
    sizes, number = stage.tokenizer, args.batch_size
    tokenizer = ImageTokenizer(sizes).requires_grad_(False).eval().to(run.device)
    tower = build_tower(stage.clip).to(run.device)
    batch = images(sizes.image_size, sizes.text_tokens, number)
    pixels = batch["image"].to(run.device).float().div_(255)
    token_ids = batch["token_ids"].to(run.device)

    def timed(function: Callable, *inputs) -> Way:
        @torch.no_grad()
        def call() -> Any:
            with run.accelerator.autocast():
                return function(*inputs)

        return Way(call, number)

    ways = {"encode": timed(tokenizer.encode, pixels), "text": timed(tower, token_ids)}
    latents, states = ways["encode"].call().mean, ways["text"].call()
    ways["decode"] = timed(tokenizer.decode, latents, states)
    return time_ways(ways, run.device, stage.precision, args.seconds, args.rounds)


def made_up_photo(rng: np.random.Generator) -> bytes:
    """A JPEG of 1200 x 900 pixels with coarse and fine detail."""
    coarse, fine = (
        rng.integers(256, size=size, dtype=np.uint8) for size in ((30, 40, 3), (900, 1200, 3))
    )
    image = Image.fromarray(coarse).resize((1200, 900))
    file = io.BytesIO()
    Image.blend(image, Image.fromarray(fine), 0.1).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_readers(args: argparse.Namespace) -> dict:
    """Training's readers in this process, on shards in a temporary folder."""
    # One thread, as in a data worker, and captions beside what is decoded.
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    contents = {
        "photos": ({"jpg": made_up_photo(rng)} for _ in range(PHOTOS)),
        "tokens": (
            {"latent.npy": rng.standard_normal((2, 77, 16)).astype(np.float16)}
            for _ in range(TOKENS)
        ),
    }
    with TemporaryDirectory() as folder:
        for name, samples in contents.items():
            text = {"txt": "a photo of a thing on a table", "json": {"width": 1200}}
            numbered = ({"__key__": f"{i:06d}", **s, **text} for i, s in enumerate(samples))
            write_shard(f"{folder}/{name}.tar", numbered)
        few = {"num_workers": 0, "shuffle_buffer": 100}
        photos = ImageTextConfig(shards=[f"{folder}/photos.tar"], **few)
        tokens = TokenTextConfig(shards=[f"{folder}/tokens.tar"], **few)
        streams = {
            "photos": image_reader(photos, 256, tokenize=None).stream(16, seed=0),
            "tokens": token_reader(tokens, 77, 16, tokenize=None).stream(100, seed=0),
        }
        batches = {name: iter(stream) for name, stream in streams.items()}
        ways = {
            name: Way(partial(next, items), len(next(items)["key"]))
            for name, items in batches.items()
        }
        return time_ways(ways, torch.device("cpu"), "fp32", args.seconds, args.rounds)


PARTS = {  # part -> (what measures it, default config, default batch size)
    "train": (measure_training, FLOWTOK_B, 16),
    "sample": (measure_sampling, FLOWTOK_B, 8),
    "encode": (measure_encoding, TOKENIZER, 8),
    "readers": (measure_readers, None, None),
}


# Command line


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The part, and what it runs on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name, (_, config, batch_size) in PARTS.items():
        part = parts.add_parser(name)
        part.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
        part.add_argument("--rounds", type=int, default=5, help="in which it is cut")
        part.add_argument("--json", action="store_true", help="print one JSON object")
        if config:
            part.add_argument("--config", type=Path, default=config, help="default: %(default)s")
            part.add_argument("--batch-size", type=int, default=batch_size)
            part.add_argument("overrides", nargs="*", metavar="key=value")
    parts.choices["train"].add_argument(
        "--text-tower", action="store_true", help="run the text tower in each step"
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1 or getattr(args, "batch_size", 1) < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    return args


def describe_machine() -> dict:
    """What figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next(line.split(": ")[1] for line in info if line.startswith("model name")),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    measure, *_ = PARTS[args.part]
    result = {"part": args.part, "machine": describe_machine(), "measures": measure(args)}
    if args.json:
        print(json.dumps(result))
        return
    print(json.dumps(result["machine"]))
    for name, row in result["measures"].items():
        rate = "samples/s {median:.4g} ({low:.4g}..{high:.4g})".format(**row["samples_per_second"])
        share = "{median:.0%} ({low:.0%}..{high:.0%}) of torch.mm".format(**row["share_of_mm"])
        print(f"{name:<12} {rate}, {share}, {row['gflop_per_sample']:.4g} GFLOP a sample")


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
