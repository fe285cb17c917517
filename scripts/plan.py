"""What a stage will cost before it runs: weights, GFLOP, memory per GPU, days, disk.

    python scripts/plan.py configs/flowtok_h/flowtok.yaml --gpu a100-80g --num-gpus 8 [key=value ...]

Needs no data, weights or GPU: the stage's own step runs on fake tensors, which have shapes but no
values. A multiply-add is 2 FLOPs, GFLOP are 10^9, GiB 2^30 bytes. Days are all FLOPs over those that
the GPUs do at --share of their peak. The text tower counts in each step, as without stored states.

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
from unittest.mock import patch
from weakref import finalize

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks here only

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import train_text_decoder
from configs.cli import exit_on_error
from modeling import losses
from scripts import train_text_encoder
from scripts.workload import Stage, Workload, build_tower, build_workload, read_stage
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

# torch's formulas know attention by CUDA's kernels only
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": flop_counter.sdpa_flop,
    "_scaled_dot_product_flash_attention_for_cpu_backward": flop_counter.sdpa_backward_flop,
}
for name, formula in ATTENTION.items():
    flop_counter.register_flop_formula(getattr(torch.ops.aten, name), get_raw=True)(formula)


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
    """Of one step."""

    work: Workload  # its networks, fake
    flops: float  # of a sample
    peak: int  # bytes, without EMA and the buckets of DDP


def measure_step(stage: Stage, num_gpus: int, batch_size: int, index: int = 0) -> Cost:
    """Step `index` of a stage on one of the GPUs, at a batch per GPU and pass."""
    training = getattr(stage.config, "training", None)
    with fake_machine((training or stage.config).precision, num_gpus) as (run, meter):
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
        work.step(batches, index)
        return Cost(work, meter.flops / (passes * batch_size), meter.peak)


def tower_flops(stage: Stage) -> int:
    """Of the text states of a caption."""
    if stage.clip is None or not getattr(stage.config, "store_text_states", True):
        return 0
    with fake_machine("fp32") as (_, meter):
        tower = build_tower(stage.clip)
        meter.flops = 0
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


def resident_bytes(work: Workload, num_gpus: int) -> dict[str, int]:
    """What lies on a GPU all the time, and the gradients."""
    trained = count_weights(work)["trained"]
    return {
        "weights": sum(num_bytes(network.module) for network in work.networks.values()),
        "ema": num_bytes(work.networks[""].module) if work.networks else 0,
        "optimizer_moments": 8 * trained,
        "gradients": 4 * trained,
        "gradient_buckets": 4 * trained if num_gpus > 1 else 0,  # DDP's copy of the gradients
        "frozen": sum(map(num_bytes, work.frozen.values())),
    }


# The plan


def make_plan(
    file: str | Path,
    overrides: Sequence[str] = (),
    gpu: str = "a100-80g",
    num_gpus: int = 8,
    share: float = 0.4,
) -> dict:
    """Everything that --json prints.

    Raises:
        ValueError: a bad config, a run of unknown sizes, or a batch that the GPUs can't share.
    """
    stage = read_stage(file, overrides)
    config = stage.config
    training = getattr(config, "training", None)  # None: stage tokens
    if training:
        training.compile = False  # fake tensors can't be compiled

    # The machine, and the part of a batch that one GPU has in one pass.
    memory, bf16, tf32 = GPUS[gpu]
    precision = (training or config).precision
    tflops = bf16 if precision == "bf16" else tf32
    limit = memory * (1 - RESERVE)
    machine = {"gpu": gpu, "num_gpus": num_gpus, "peak_tflops": tflops, "usable_gib": limit}
    batch = training.batch_size if training else config.batch_size * num_gpus
    passes = training.gradient_accumulation if training else 1
    if batch % (num_gpus * passes):
        raise ValueError(
            f"training.batch_size {batch} is not divisible by --num-gpus x "
            f"training.gradient_accumulation = {num_gpus} x {passes}"
        )
    per_pass = batch // (num_gpus * passes)

    # Each activation checkpointing, at the last step, which is the heaviest.
    costs, fits = {}, {}
    for mode in MODES if hasattr(config, "activation_checkpointing") else MODES[:1]:
        costs[mode], fits[mode] = fit_mode(stage, mode, per_pass, num_gpus, limit)
    chosen = getattr(config, "activation_checkpointing", "none")
    cost = costs[chosen]
    resident = resident_bytes(cost.work, num_gpus)
    tower = tower_flops(stage)

    # All steps; before the discriminator's start they cost less.
    flops = cost.flops
    if training and "discriminator_" in cost.work.networks:
        early_share = config.adversarial.start_step / training.max_steps
        early = measure_step(with_mode(stage, chosen), num_gpus, per_pass, index=0).flops
        flops = early_share * early + (1 - early_share) * flops
    rate = share * num_gpus * tflops * 1e12 / flops  # samples/s
    time = {"share_of_peak": share, "samples_per_second": rate}
    disk = {}
    if training:
        time["days"] = training.max_steps * batch / rate / DAY
        kept = sum(resident[name] for name in ("weights", "ema", "optimizer_moments")) / GIB
        # One checkpoint more than are kept is there while it is written.
        disk = {"checkpoint_gib": kept, "run_gib": kept * (training.keep_checkpoints + 1)}

    return {
        "config": str(file),
        "stage": config.stage,
        "machine": machine,
        "run": {
            "precision": precision,
            "max_steps": training.max_steps if training else None,
            "batch_size": batch,
            "batch_per_gpu_and_pass": per_pass,
            "activation_checkpointing": chosen,
        },
        "weights": count_weights(cost.work),
        "gflop_per_sample": {
            "text_tower": tower / 1e9,
            "recompute": (cost.flops - costs["none"].flops) / 1e9,
            "total": cost.flops / 1e9,
        },
        "memory_gib": {name: size / GIB for name, size in resident.items()},
        "activation_checkpointing": fits,
        "time": time,
        "disk": disk,
    }


def with_mode(stage: Stage, mode: str) -> Stage:
    """The stage with another activation checkpointing, if it offers one."""
    if not hasattr(stage.config, "activation_checkpointing"):
        return stage
    return replace(stage, config=replace(stage.config, activation_checkpointing=mode))


def fit_mode(
    stage: Stage, mode: str, batch: int, num_gpus: int, limit_gib: float
) -> tuple[Cost, dict]:
    """The cost of the last step with an activation checkpointing, and what fits a GPU."""
    stage, training = with_mode(stage, mode), getattr(stage.config, "training", None)
    last = training.max_steps - 1 if training else 0
    cost, more = (measure_step(stage, num_gpus, n, last) for n in (batch, batch + PROBE_BATCH))
    resident = resident_bytes(cost.work, num_gpus)
    peak = cost.peak + resident["ema"] + resident["gradient_buckets"]
    a_sample = (more.peak - cost.peak) / PROBE_BATCH
    room = limit_gib * GIB - peak
    return cost, {
        "peak_gib": peak / GIB,
        "fits": room >= 0,
        "largest_batch": max(0, batch + int(room // a_sample)),
        "mib_per_sample": a_sample / 2**20,
        "gflop_per_sample": cost.flops / 1e9,
    }


def print_plan(plan: dict) -> None:
    """The plan as text: a line for each value, a table of the modes."""
    for name, part in plan.items():
        if name == "activation_checkpointing":
            print("activation_checkpointing, each at this batch per GPU and pass:")
            columns = list(part["none"])
            print("  " + "".join(f"{column:>18}" for column in ["", *columns]))
            for mode, row in part.items():
                cells = [mode, *(f"{value:.4g}" for value in row.values())]
                print("  " + "".join(f"{cell:>18}" for cell in cells))
        elif isinstance(part, dict):
            print(name)
            for key, value in part.items():
                text = f"{value:,.2f}" if isinstance(value, float) else value
                print(f"  {key:<26}{text:>18}")
        else:
            print(f"{name}: {part}")


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
    args = parser.parse_args()
    if args.num_gpus < 1 or not 0 < args.share <= 1:
        parser.error(f"--num-gpus {args.num_gpus} or --share {args.share} is out of range")
    plan = exit_on_error(
        lambda: make_plan(args.file, args.overrides, args.gpu, args.num_gpus, args.share)
    )
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)


if __name__ == "__main__":
    main()
