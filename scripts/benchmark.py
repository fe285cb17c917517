"""How fast training, sampling and encoding are on this machine.

    python scripts/benchmark.py train --config configs/flowtok_b/flowtok.yaml --batch-size 16
    python scripts/benchmark.py sample --config configs/flowtok_b/flowtok.yaml sampling.steps=4
    python scripts/benchmark.py encode --config configs/tokenizer_bl77_256/tokens.yaml
    python scripts/benchmark.py readers

train: the optimiser step of any stage with its EMA, on stored text states. encode: what stage
tokens does with a batch. sample: the parts of an image, from caption to pixels, and a single one's
flow. These run the programs' own code on made-up batches with random weights, need no data, and are
in float32 on a CPU. readers: made-up shards of photos and of tokens, read by one process.

A machine's speed changes while one measures, so everything is timed in rounds, right after
torch.mm. A share is FLOPs, those of recomputation included, by time, by the best rate of torch.mm.
Figures are medians with the range of the rounds, as YAML, on a GPU with its peak memory. On a CPU,
malloc should keep what is freed, as where train_flowtok.sh trains: set the MALLOC_ variables of its
header.
"""

import argparse
import io
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data.files import integer, user_path
from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, token_reader
from data.tar import write_shard
from eval.programs import build_parser
from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import ImageGenerator
from scripts.workload import print_figures
from scripts.workload.sizes import Stage, read_stage
from scripts.workload.steps import fill_zeros, make_batch, repeated_step
from training.errors import ROOT, exit_on_error
from training.run import Run, start_run

# Of --config, of --batch-size, and the key of the precision that is timed
DEFAULTS = {
    "train": ("configs/flowtok_b/flowtok.yaml", 16, "training.precision"),
    "sample": ("configs/flowtok_b/flowtok.yaml", 8, "sampling.precision"),
    "encode": ("configs/tokenizer_bl77_256/tokens.yaml", 8, "precision"),
    "readers": ("", 0, ""),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MM_SIZES = {"cpu": (1024, 1536, 2048), "cuda": (4096, 6144, 8192)}  # of square matrices
MM_SECONDS = 0.2  # for each of them
PHOTOS, TOKENS = 48, 4000  # samples of the made-up shards


# Timing


class Way(NamedTuple):
    call: Callable[[], Any]
    samples: int  # of a call


def seconds_per_call(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Mean over calls for about so long, one at least."""
    # A kernel is only queued when its call returns.
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait()
    start = time.perf_counter()
    call()
    wait()
    more = int(seconds / (time.perf_counter() - start))
    for _ in range(more):
        call()
    wait()
    return (time.perf_counter() - start) / (1 + more)


def mm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm now: the best of a few large sizes."""
    # No single size is the fastest on every machine.
    rates = []
    for size in MM_SIZES[device.type]:
        square = torch.randn(size, size, device=device, dtype=dtype)
        seconds = seconds_per_call(lambda x=square: torch.mm(x, x), device, MM_SECONDS)
        rates.append(2 * size**3 / seconds)
    return max(rates)


def first_calls(way: Way, device: torch.device) -> dict[str, float]:
    """FLOPs and, on a GPU, the most memory; also pays for allocations and the moments."""
    with FlopCounterMode(display=False) as counter:
        way.call()
    figures = {"gflop_per_sample": counter.get_total_flops() / way.samples / 1e9}
    # Apart: the counter keeps tensors alive that activation checkpointing frees.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        way.call()
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def time_ways(
    ways: dict[str, Way], device: torch.device, precision: str, args: argparse.Namespace
) -> dict[str, dict]:
    """Figures of each way, all timed in each round for seconds / rounds."""
    figures = {name: first_calls(way, device) for name, way in ways.items()}
    rates, peaks = {name: [] for name in ways}, {name: [] for name in ways}
    # In turn, each beside torch.mm: a machine's speed changes while one measures.
    for _ in range(args.rounds):
        for name, way in ways.items():
            peaks[name].append(mm_rate(device, DTYPES[precision]) / 1e9)
            seconds = seconds_per_call(way.call, device, args.seconds / args.rounds)
            rates[name].append(way.samples / seconds)
    for name, row in figures.items():
        pairs = zip(rates[name], peaks[name], strict=True)
        row["samples_per_second"] = spread(rates[name])
        row["share_of_mm"] = spread([row["gflop_per_sample"] * rate / peak for rate, peak in pairs])
        row["mm_gflop_per_second"] = median(peaks[name])
    return figures


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


# What is timed


def start(args: argparse.Namespace) -> tuple[Stage, Run]:
    """The stage of --config in its own precision or, on a CPU, in float32."""
    _, _, key = DEFAULTS[args.part]
    own = [] if torch.cuda.is_available() else [f"{key}=fp32"]
    stage = read_stage(args.config, [*own, *args.overrides])
    return stage, start_run("", attrgetter(key)(stage.config), seed=0)


def measure_step(args: argparse.Namespace) -> dict:
    """The step of a stage, its EMA included."""
    stage, run = start(args)
    step = repeated_step(stage, run, args.batch_size, stored_states=not args.text_tower)
    return time_ways({args.part: Way(step, args.batch_size)}, run.device, stage.precision, args)


def measure_sampling(args: argparse.Namespace) -> dict:
    """The parts of an image, from token ids to pixels."""
    stage, run = start(args)
    config, device, number = stage.config, run.device, args.batch_size
    sampling = config.sampling
    indices = list(range(number))

    # Random weights, none of them zero.
    tokenizer = ImageTokenizer(stage.tokenizer)
    flow = build_flow(config.projector, config.flowtok, config.flow)
    for module in (tokenizer, flow):
        fill_zeros(module)
        module.requires_grad_(False).eval().to(device)
    parts = ImageGenerator(stage.make_tower().to(device), tokenizer, flow)

    # What each part hands to the next.
    token_ids = make_batch(stage, number)["token_ids"].to(device)
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
    return time_ways(ways, device, sampling.precision, args)


def measure_readers(args: argparse.Namespace) -> dict:
    """Training's readers in this process, on shards in a temporary folder."""
    torch.set_num_threads(1)  # as in a data worker
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 77, 16)).astype(np.float16)
    few = {"num_workers": 0, "shuffle_buffer": 100}
    with TemporaryDirectory() as folder:
        photos, tokens = f"{folder}/photos.tar", f"{folder}/tokens.tar"
        write_captioned(photos, [{"jpg": made_up_photo(rng)} for _ in range(PHOTOS)])
        write_captioned(tokens, [{"latent.npy": latents}] * TOKENS)
        image_config = ImageTextConfig(shards=[photos], **few)
        token_config = TokenTextConfig(shards=[tokens], **few)
        batches = {
            "photos": iter(image_reader(image_config, 256, tokenize=None).stream(16, seed=0)),
            "tokens": iter(token_reader(token_config, 77, 16, tokenize=None).stream(100, seed=0)),
        }
        # The streams never end: a call is a batch
        ways = {
            name: Way(partial(next, items), len(next(items)["key"]))
            for name, items in batches.items()
        }
        return time_ways(ways, torch.device("cpu"), "fp32", args)


def write_captioned(file: str, samples: list[dict]) -> None:
    """A shard of samples with a caption and metadata beside what is decoded."""
    text = {"txt": "a photo of a thing on a table", "json": {"width": 1200}}
    write_shard(file, ({"__key__": f"{i:06d}", **s, **text} for i, s in enumerate(samples)))


def made_up_photo(rng: np.random.Generator) -> bytes:
    """A JPEG of 1200 x 900 pixels with coarse and fine detail."""
    coarse = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8))
    fine = Image.fromarray(rng.integers(256, size=(900, 1200, 3), dtype=np.uint8))
    file = io.BytesIO()
    Image.blend(coarse.resize(fine.size), fine, 0.1).save(file, "JPEG", quality=90)
    return file.getvalue()


# Command line


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("part", choices=DEFAULTS)
    add("--config", type=user_path, help="a stage; default: FlowTok-B, its tokens to encode")
    add("--batch-size", type=integer(1), help="default: 16 to train, else 8")
    add("--text-tower", action="store_true", help="train: run the text tower in each step")
    add("--seconds", type=float, default=20.0, help="of each measurement")
    add("--rounds", type=integer(1), default=5, help="in which it is cut")
    add("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.text_tower and args.part != "train":
        parser.error("--text-tower is an option of train")
    if args.part == "readers" and (args.config or args.batch_size or args.overrides):
        parser.error("readers take no --config, --batch-size or key=value")
    config, batch_size, _ = DEFAULTS[args.part]
    args.config = args.config or ROOT / config
    args.batch_size = args.batch_size or batch_size
    return args


def describe_machine() -> dict:
    # ARM's list has no name, macOS no list
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "load": os.getloadavg()[0],
    }


def main(args: argparse.Namespace) -> None:
    special = {"sample": measure_sampling, "readers": measure_readers}
    measures = special.get(args.part, measure_step)(args)
    print_figures({"part": args.part, "machine": describe_machine(), "measures": measures})


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
