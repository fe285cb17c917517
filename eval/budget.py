"""GPUs, and what fits on them: memory that lies there all the time, the largest batch, days at a share of the peak.

For scripts/plan.py; the measured part, eval.planning.Cost, comes from fake tensors. RESERVE of a GPU's memory is left
free for what those don't show: CUDA context, workspaces of kernels, NCCL's buffers, fragmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from eval.planning import Cost, Workload, at_batch

GIB, TERA, DAY = 2**30, 1e12, 86400
RESERVE = 0.10  # of a GPU's memory


@dataclass
class Gpu:
    """Memory as torch.cuda reports it, a little below the nominal size; dense tensor-core peaks of the data sheet."""

    memory_gib: float
    bf16_tflop_per_second: float
    tf32_tflop_per_second: float


GPUS = {
    "a100-80g": Gpu(79.1, 312, 156),
    "a100-40g": Gpu(39.4, 312, 156),
    "h100-80g": Gpu(79.1, 989, 495),
    "h200": Gpu(139.7, 989, 495),
    "l40s": Gpu(44.4, 362, 183),
    "l4": Gpu(22.0, 121, 60),
    "rtx4090": Gpu(23.6, 165, 83),
    "rtx3090": Gpu(23.6, 71, 36),
}


@dataclass
class Machine:
    """Where the run is to go."""

    gpu: Gpu
    num_gpus: int
    share: float  # of the peak that is reached

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a step may take."""
        return self.gpu.memory_gib * GIB * (1 - RESERVE)

    def peak_tflop_per_second(self, precision: str) -> float:
        """Of one GPU; float32 matrix products run as TF32."""
        return (
            self.gpu.bf16_tflop_per_second
            if precision == "bf16"
            else self.gpu.tf32_tflop_per_second
        )

    def seconds(self, flops: float, precision: str) -> float:
        """For FLOPs that all GPUs share."""
        return flops / (self.num_gpus * self.peak_tflop_per_second(precision) * TERA * self.share)


def per_sample(flops: np.ndarray, batch_size: int, num_gpus: int) -> float:
    """FLOPs of a sample at a batch per GPU, from those of a Cost."""
    return float(at_batch(flops, batch_size, num_gpus)) / batch_size


def num_bytes(module: nn.Module, in_checkpoint: bool = False) -> int:
    """Bytes of a network: all weights and buffers, or those that a checkpoint has."""
    tensors = (
        module.state_dict().values() if in_checkpoint else (*module.parameters(), *module.buffers())
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_trained(work: Workload) -> int:
    """Number of weights that get a gradient."""
    return sum(
        p.numel() for player in work.players() for p in player.parameters() if p.requires_grad
    )


def checkpoint_bytes(work: Workload) -> int:
    """Weights, EMA of the model, and two moments a trained weight; the small files are left out."""
    weights = sum(num_bytes(player, in_checkpoint=True) for player in work.players())
    return weights + num_bytes(work.model, in_checkpoint=True) + 8 * num_trained(work)


@dataclass
class Resident:
    """Bytes that lie on each GPU all the time, and those of the gradients."""

    weights: int
    gradients: int
    gradient_buckets: int  # DDP's own copy of the gradients
    optimizer_moments: int
    ema: int
    frozen: int  # text tower, perceptual networks
    has_gradients: bool  # all the time: the later passes of gradient accumulation

    def total(self) -> int:
        """All but gradients that a step makes and frees: its measured peak has them."""
        always = (
            self.weights + self.gradient_buckets + self.optimizer_moments + self.ema + self.frozen
        )
        return always + (self.gradients if self.has_gradients else 0)


def resident_bytes(work: Workload, num_gpus: int, has_gradients: bool) -> Resident:
    """Sizes of a step's networks and of what belongs to them; all in float32."""
    trained = num_trained(work)
    return Resident(
        weights=sum(num_bytes(player) for player in work.players()),
        gradients=4 * trained,
        gradient_buckets=4 * trained if num_gpus > 1 else 0,
        optimizer_moments=8 * trained,
        ema=num_bytes(work.model),
        frozen=sum(num_bytes(module) for module in work.frozen),
        has_gradients=has_gradients,
    )


def largest_batch(peak_bytes: Callable[[int], float], limit: float) -> int:
    """Largest batch whose peak, which grows with the batch, is within the limit; 0 if none is."""
    low, high = 0, 1
    while peak_bytes(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_bytes(middle) <= limit else (low, middle)
    return low


def accumulation_needed(
    batch_per_gpu: int, largest: int, largest_with_gradients: int
) -> int | None:
    """Fewest equal passes into which a GPU's share of the batch can be cut so that each fits, or None."""
    if batch_per_gpu <= largest:
        return 1
    passes = (n for n in range(2, batch_per_gpu + 1) if batch_per_gpu % n == 0)
    return next((n for n in passes if batch_per_gpu // n <= largest_with_gradients), None)


@dataclass
class Fit:
    """How one way to run a step fits a GPU, at a batch per GPU and pass."""

    peak_gib: float
    fits: bool
    largest_batch_per_gpu_and_pass: int
    gradient_accumulation_needed: (
        int | None
    )  # for the GPU's share of the whole batch; None: does not fit at all


def find_fit(
    cost: Cost, resident: Resident, machine: Machine, batch_size: int, num_passes: int
) -> Fit:
    """Fit of a measured step; with more passes than measured, all gradients count on top of its peak."""

    def peak(size: int) -> float:
        return resident.total() + cost.peak_bytes(size, machine.num_gpus)

    largest = largest_batch(peak, machine.limit)
    with_gradients = (
        largest
        if resident.has_gradients
        else largest_batch(peak, machine.limit - resident.gradients)
    )
    needed = accumulation_needed(batch_size * num_passes, largest, with_gradients)
    return Fit(peak(batch_size) / GIB, batch_size <= largest, largest, needed)
