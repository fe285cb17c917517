"""What a stage will cost before it runs: weights, GFLOP, memory per GPU, days, disk.

    python scripts/plan.py configs/flowtok_h/flowtok.yaml --gpu a100-80g --num-gpus 8 [key=value ...]

Needs no data, weights or GPU: the stage's own step runs on fake tensors, which have shapes but no
values. A multiply-add is 2 FLOPs, GFLOP are 10^9, GiB 2^30 bytes. Days are all FLOPs over those
that the GPUs do at --share of their peak. The text tower counts in each step, as without stored
text states.

Not counted: reading data; pictures and evaluations; the CUDA context, workspaces inside kernels,
NCCL's buffers and fragmentation, for which a tenth of the memory is kept free; that the perceptual
networks run in float32, at half the peak.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import finalize

# Run as a file, Python looks for modules in scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import train_text_decoder
from modeling import losses
from scripts import train_text_encoder
from scripts.workload import Stage, Workload, build_tower, build_workload, read_stage
from training.errors import exit_on_error
from training.run import Run

GIB, DAY = 2**30, 86400
RESERVE = 0.10  # of a GPU's memory
PROBE_BATCH = 8192  # up to there the peak is taken as linear in the batch
MODES = ("none", "selective", "full")  # of activation checkpointing
# Memory in GiB as torch.cuda reports it; dense TFLOP/s of the data sheet in bf16 and in TF32
GPUS = {
    "a100-80g": (79.1, 312, 156),
    "a100-40g": (39.4, 312, 156),
    "h100-80g": (79.1, 989, 495),
    "h200": (139.7, 989, 495),
    "l40s": (44.4, 362, 183),
    "l4": (22.0, 121, 60),
    "rtx4090": (23.6, 165, 83),
    "rtx3090": (23.6, 71, 36),
}

# Fake tensors


class CudaLike(TorchFunctionMode):
    """Keep for the backward pass what CUDA keeps; fake tensors are tensors of the CPU.

    Under autocast CUDA normalises in float32, and its dropout keeps a mask of bytes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


class Meter(TorchDispatchMode):
    """FLOPs by the formulas of torch's FlopCounterMode, and bytes of the tensors that exist.

    FlopCounterMode itself keeps tensors alive that activation checkpointing frees.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if formula := flop_counter.flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=output)
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return output

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.storages.remove(key)
        self.live -= size


@contextmanager
def fake_machine(precision: str, num_gpus: int = 1) -> Iterator[tuple[Run, Meter]]:
    """(the run of one GPU of a job, the meter); all tensors made inside are fake."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier plan in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    replaced = [
        # What looks at values: captions fill the context, images and weights are not random.
        (train_text_decoder, "counted_positions", lambda ids: torch.arange(ids.numel())),
        (train_text_encoder, "random_shift", lambda images: images),
        (nn.init, "trunc_normal_", lambda tensor, **bounds: tensor),
        # The contrastive loss has the rows of all GPUs.
        (losses, "gather_rows", lambda rows: rows.repeat(num_gpus, 1)),
        # module.to(device) of what is there already: fake tensors can't be swapped.
        (torch.utils, "swap_tensors", lambda old, new: None),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(CudaLike())
        yield Run(Path(), accelerator, 0.0), stack.enter_context(Meter())


# Measuring


@dataclass
class Cost:
    """Of one step on one GPU."""

    work: Workload  # its networks, fake
    flops: float  # of a sample
    peak: int  # bytes, without EMA and the buckets of DDP


def measure_step(stage: Stage, num_gpus: int, batch_size: int, is_last: bool = True) -> Cost:
    """The last step of a stage, which is its heaviest, or the first, at a batch per pass."""
    training = stage.training
    with fake_machine(stage.precision, num_gpus) as (run, meter):
        work = build_workload(stage, run)
        # A first update, with gradients of 0, makes the optimiser's moments.
        for network in work.networks.values():
            for parameter in network.trainable:
                parameter.grad = torch.zeros_like(parameter)
            network.update(0, training.max_steps)
        # With more than one pass, the gradients of the first lie there during the second.
        passes = min(2, training.gradient_accumulation) if training else 1
        batches = [work.make_batch(batch_size) for _ in range(passes)]
        meter.flops, meter.peak = 0, meter.live
        work.step(batches, training.max_steps - 1 if training and is_last else 0)
        return Cost(work, meter.flops / (passes * batch_size), meter.peak)


def tower_flops(stage: Stage) -> int:
    """Of the text states of a caption."""
    if stage.clip is None or not getattr(stage.config, "store_text_states", True):
        return 0
    with fake_machine("fp32") as (_, meter):
        tower = build_tower(stage.clip)
        tower(torch.zeros(1, tower.shape[0], dtype=torch.int64))
        return meter.flops


def num_bytes(module: nn.Module) -> int:
    """Of weights and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_weights(work: Workload) -> dict[str, int]:
    """Number of weights by network, and of all that are trained."""
    parts = dict(work.networks[""].module.named_children()) if work.networks else {}
    parts |= {f"{name}network": net.module for name, net in work.networks.items() if name}
    parts |= {f"{name}_frozen": module for name, module in work.frozen.items()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = sum(p.numel() for network in work.networks.values() for p in network.trainable)
    return {name: count for name, count in counts.items() if count} | {"trained": trained}


def resident_gib(work: Workload, num_gpus: int) -> dict[str, float]:
    """What lies on a GPU all the time, and the gradients."""
    trained = count_weights(work)["trained"]
    sizes = {
        "weights": sum(num_bytes(network.module) for network in work.networks.values()),
        "ema": num_bytes(work.networks[""].module) if work.networks else 0,
        "optimizer_moments": 8 * trained,
        "gradients": 4 * trained,
        "gradient_buckets": 4 * trained if num_gpus > 1 else 0,  # DDP's copy of the gradients
        "frozen": sum(map(num_bytes, work.frozen.values())),
    }
    return {name: size / GIB for name, size in sizes.items()}


# The plan


def batch_sizes(stage: Stage, num_gpus: int) -> tuple[int, int]:
    """(samples of a step, samples of one GPU in one pass).

    Raises:
        ValueError: a batch that the GPUs can't share.
    """
    training = stage.training
    batch_size = training.batch_size if training else num_gpus * stage.config.batch_size
    passes = training.gradient_accumulation if training else 1
    if batch_size % (num_gpus * passes):
        raise ValueError(
            f"training.batch_size {batch_size} is not divisible by --num-gpus x "
            f"training.gradient_accumulation = {num_gpus} x {passes}"
        )
    return batch_size, batch_size // (num_gpus * passes)


def make_plan(
    file: str | Path,
    overrides: Sequence[str] = (),
    gpu: str = "a100-80g",
    num_gpus: int = 8,
    share: float = 0.4,
) -> dict:
    """Everything that is printed; a stage that does not train has no steps, days and disk.

    Raises:
        ValueError: a bad config, a run of unknown sizes, or a batch that the GPUs can't share.
    """
    stage = read_stage(file, overrides)
    config, training = stage.config, stage.training

    # What the GPUs have, and the samples of one GPU in one pass.
    memory, bf16_tflops, tf32_tflops = GPUS[gpu]
    peak_tflops = bf16_tflops if stage.precision == "bf16" else tf32_tflops
    usable_gib = memory * (1 - RESERVE)
    batch_size, batch = batch_sizes(stage, num_gpus)

    # Each activation checkpointing that the stage offers, at its last step.
    chosen = getattr(config, "activation_checkpointing", "none")
    costs, modes = {}, {}
    for mode in MODES if hasattr(config, "activation_checkpointing") else MODES[:1]:
        costs[mode], modes[mode] = fit_mode(with_mode(stage, mode), num_gpus, batch, usable_gib)

    # Weights and memory do not depend on the mode, FLOPs and with them the time do.
    cost = costs[chosen]
    resident = resident_gib(cost.work, num_gpus)
    rate = share * num_gpus * peak_tflops * 1e12 / mean_flops(stage, cost, num_gpus, batch)
    plan = {
        "config": str(file),
        "stage": config.stage,
        "machine": {"gpu": gpu, "num_gpus": num_gpus, "usable_gib": usable_gib},
        "run": {
            "precision": stage.precision,
            "batch_size": batch_size,
            "batch_per_gpu_and_pass": batch,
            "activation_checkpointing": chosen,
        },
        "weights": count_weights(cost.work),
        "gflop_per_sample": {
            "text_tower": tower_flops(stage) / 1e9,
            "recompute": (cost.flops - costs["none"].flops) / 1e9,
            "total": cost.flops / 1e9,
        },
        "memory_gib": resident | {"peak": modes[chosen]["peak_gib"]},
        "activation_checkpointing": modes,
        "time": {"tflops": peak_tflops, "share": share, "samples_per_second": rate},
    }
    if training:
        plan["time"]["days"] = training.max_steps * batch_size / rate / DAY
        checkpoint = sum(resident[name] for name in ("weights", "ema", "optimizer_moments"))
        # One checkpoint more than are kept is there while it is written.
        disk = {"checkpoint": checkpoint, "run": checkpoint * (training.keep_checkpoints + 1)}
        plan["disk_gib"] = disk
    return plan


def with_mode(stage: Stage, mode: str) -> Stage:
    """The stage with another activation checkpointing, if it offers one."""
    config = stage.config
    if hasattr(config, "activation_checkpointing"):
        config = replace(config, activation_checkpointing=mode)
    return replace(stage, config=config)


def fit_mode(stage: Stage, num_gpus: int, batch: int, usable_gib: float) -> tuple[Cost, dict]:
    """A stage's cost at a batch per GPU and pass, and what fits a GPU."""
    cost = measure_step(stage, num_gpus, batch)
    # The EMA is updated after the step, and DDP is not on a single fake GPU.
    resident = resident_gib(cost.work, num_gpus)
    peak_gib = cost.peak / GIB + resident["ema"] + resident["gradient_buckets"]
    more = measure_step(stage, num_gpus, batch + PROBE_BATCH).peak - cost.peak
    gib_per_sample = more / PROBE_BATCH / GIB
    return cost, {
        "peak_gib": peak_gib,
        "fits": peak_gib <= usable_gib,
        "largest_batch": max(0, batch + int((usable_gib - peak_gib) // gib_per_sample)),
        "mib_per_sample": 1024 * gib_per_sample,
        "gflop_per_sample": cost.flops / 1e9,
    }


def mean_flops(stage: Stage, cost: Cost, num_gpus: int, batch: int) -> float:
    """Of a sample over all steps: before the discriminator's start a step costs less."""
    if "discriminator_" not in cost.work.networks:
        return cost.flops
    first = measure_step(stage, num_gpus, batch, is_last=False)
    early = stage.config.adversarial.start_step / stage.training.max_steps
    return early * first.flops + (1 - early) * cost.flops


def rounded(value: Any) -> Any:
    """Nested values with four digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="CONFIG", help="YAML file of a stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80g")
    parser.add_argument("--num-gpus", type=int, default=8, help="of the whole job")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args()
    if args.num_gpus < 1 or not 0 < args.share <= 1:
        parser.error(f"--num-gpus {args.num_gpus} or --share {args.share} is out of range")
    plan = exit_on_error(
        lambda: make_plan(args.file, args.overrides, args.gpu, args.num_gpus, args.share)
    )
    if args.json:
        print(json.dumps(plan))
    else:
        print(yaml.safe_dump(rounded(plan), sort_keys=False, default_flow_style=None, width=100))


if __name__ == "__main__":
    main()
