"""A stage's own step on fake tensors, which have shapes but no values: its FLOPs and its memory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch
from weakref import finalize

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
from modeling import losses
from scripts import train_text_encoder
from scripts.workload.sizes import Stage, why_unplanned
from scripts.workload.steps import Workload, build_workload, make_batch
from training.run import Run, refuse_engines

GIB = 2**30  # bytes
# How often FSDP has the weights of a block at once: of the block that runs, of the next one, in
# their exchange; the block's gradients, in theirs. And all that is in no block: no next one.
BLOCK_COPIES, REST_COPIES = 5, 3


class CudaLike(TorchFunctionMode):
    """Keep for the backward pass what CUDA keeps; fake tensors are tensors of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Under autocast CUDA normalises in float32
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        # Its dropout keeps a mask of bytes
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
        self.storages: dict[int, float] = {}  # bytes of what is there

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
        # Views share a storage; it counts until the last of them is gone.
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.live -= self.storages.pop(key)

    def split(self, tensor: Tensor, parts: int) -> None:
        """From now on only one of so many parts of a tensor is here."""
        storage = tensor.untyped_storage()
        part = storage.nbytes() / parts
        self.live += part - self.storages[storage._cdata]
        self.storages[storage._cdata] = part


@contextmanager
def fake_machine(precision: str, num_gpus: int = 1) -> Iterator[tuple[Run, Meter]]:
    """(the run of one GPU of a job, the meter); all tensors made inside are fake."""
    # accelerate keeps its settings per process: an earlier plan's are forgotten.
    AcceleratorState._reset_state(reset_partial_state=True)
    refuse_engines()
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


@dataclass
class Cost:
    """Of one step on one GPU."""

    flops: float  # of a sample
    peak_gib: float
    weights: dict[str, int]  # by network, and of all that are trained
    resident_gib: dict[str, float]  # what lies on the GPU all the time, and the gradients
    checkpoint_gib: float  # weights, moments and EMA, whole


def measure_step(stage: Stage, num_gpus: int, batch_size: int, is_last: bool = True) -> Cost:
    """The last step of a stage, which is its heaviest, or the first, at a batch per pass.

    Raises:
        ValueError: fake tensors can't tell.
    """
    if reason := why_unplanned(stage.config):
        raise ValueError(reason)
    training = stage.training
    parts = num_gpus if training and training.shard == "full" else 1
    with fake_machine(stage.precision, num_gpus) as (run, meter):
        work = build_workload(stage, run)
        if parts > 1:
            split_weights(work.networks[""].module, meter, parts)
        # A first update, with gradients of 0, makes the optimiser's moments.
        for network in work.networks.values():
            for parameter in network.trainable:
                parameter.grad = torch.zeros_like(parameter)
            network.update(0, training.max_steps)
        if parts > 1:
            for moments in work.networks[""].optimizer.state.values():
                for moment in moments.values():
                    meter.split(moment, parts)
        # With more than one pass, the gradients of the first lie there during the second.
        passes = min(2, training.gradient_accumulation) if training else 1
        batches = [make_batch(stage, batch_size) for _ in range(passes)]
        meter.flops, meter.peak = 0, meter.live
        work.step(batches, training.max_steps - 1 if training and is_last else 0)
        # The EMA is updated after the step; neither DDP nor FSDP is on a single fake GPU.
        resident = resident_gib(work, num_gpus, parts)
        later = ("ema", "gradient_buckets", "gathered")
        peak = meter.peak / GIB + sum(resident[name] for name in later)
        flops = meter.flops / (passes * batch_size)
        whole = resident_gib(work, num_gpus, 1)
        checkpoint = sum(whole[name] for name in ("weights", "ema", "optimizer_moments"))
        return Cost(flops, peak, count_weights(work), resident, checkpoint)


def tower_flops(stage: Stage) -> int:
    """Of the text states of a caption."""
    if stage.make_tower is None or not getattr(stage.config, "store_text_states", True):
        return 0
    with fake_machine("fp32") as (_, meter):
        tower = stage.make_tower()
        tower(torch.zeros(1, tower.shape[0], dtype=torch.int64))
        return meter.flops


def count_weights(work: Workload) -> dict[str, int]:
    """Number of weights by network, and of all that are trained."""
    parts = dict(work.networks[""].module.named_children()) if work.networks else {}
    parts |= {f"{name}network": net.module for name, net in work.networks.items() if name}
    parts |= {f"{name}_frozen": module for name, module in work.frozen.items()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trained = sum(p.numel() for network in work.networks.values() for p in network.trainable)
    return {name: count for name, count in counts.items() if count} | {"trained": trained}


def split_weights(module: nn.Module, meter: Meter, parts: int) -> None:
    """Leave one part of the weights, and of each gradient as soon as it is there."""

    def split_gradient(weight: nn.Parameter) -> None:
        meter.split(weight.grad, parts)

    for weight in module.parameters():
        meter.split(weight, parts)
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(split_gradient)


def gathered_bytes(module: nn.Module) -> int:
    """What sharded training has at once of weights and gradients beside the parts."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    blocks = [num_bytes(block) for blocks in lists for block in blocks]
    rest = num_bytes(module) - sum(blocks)
    return BLOCK_COPIES * max(blocks, default=0) + REST_COPIES * rest


def resident_gib(work: Workload, num_gpus: int, parts: int) -> dict[str, float]:
    """Memory by what it is for; parts: of the network that has an EMA, 1 if it is not sharded."""
    names = ("weights", "ema", "optimizer_moments", "gradients", "gradient_buckets", "gathered")
    sizes = dict.fromkeys(names, 0.0)
    for name, network in work.networks.items():
        share = 1 if name else parts
        size = num_bytes(network.module) / share
        trained = 4 * sum(p.numel() for p in network.trainable) / share
        sizes["weights"] += size
        sizes["optimizer_moments"] += 2 * trained
        sizes["gradients"] += trained
        if not name:
            sizes["ema"] = size
        # FSDP gathers weights and gradients, DDP copies the gradients.
        if share > 1:
            sizes["gathered"] = gathered_bytes(network.module)
        elif num_gpus > 1:
            sizes["gradient_buckets"] += trained
    sizes["frozen"] = sum(map(num_bytes, work.frozen.values()))
    return {name: size / GIB for name, size in sizes.items()}


def num_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
