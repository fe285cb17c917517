"""What a step costs, measured without data, weights or a GPU: FLOPs (2 a multiply-add), and memory event by event.

Networks run on fake tensors: every operator runs, on shapes alone. A `Recorder` notes each storage that is made or
freed, in order, and the FLOPs, by the formulas of torch's FlopCounterMode. The largest running sum is the step's peak.

One run at a batch of PROBE_BATCH, a prime, tells how each size depends on the batch: it is a multiple of the batch, of
its square (the logits of the contrastive loss), or constant. Of a stack of equal blocks five run, and the third stands
for the others. Both are exact (tests/test_plan.py).

Fake tensors are CPU tensors; where CPU and CUDA kernels keep different tensors for the backward pass, `CudaLike` does
what CUDA does. Not seen: the CUDA context, workspaces inside kernels, buffers of NCCL, rounding and fragmentation of
the allocator.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import ref

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.optim import OptimizerConfig, build_optimizer

PROBE_BATCH = 1009
RUN_BLOCKS = 5  # of a stack of equal ones
ATEN = torch.ops.aten
# FlopCounterMode knows attention by CUDA's kernels. Their backward computes the scores again: 2.5 times the forward.
FLOP_FORMULAS = {
    **flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        ATEN._scaled_dot_product_flash_attention
    ],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
FLOAT32_ON_CUDA = (F.layer_norm, F.group_norm)  # by autocast, of what our networks run
Terms = dict[str, Tensor]  # "loss" is what is minimised


@dataclass
class Workload:
    """A step of a stage on one GPU. It is built on the meta device, and runs on fake tensors of the CPU."""

    model: nn.Module
    make_batch: Callable[[int], dict]  # number of samples -> batch
    loss_fn: Callable[[nn.Module, dict], Terms]
    frozen: list[nn.Module] = field(
        default_factory=list
    )  # what else is on the GPU: text tower, perceptual networks
    opponent: nn.Module | None = None  # a discriminator, trained in the same step
    opponent_loss_fn: Callable[[nn.Module], Terms] | None = None

    def players(self) -> list[nn.Module]:
        """What is trained."""
        return [self.model] if self.opponent is None else [self.model, self.opponent]


class CudaLike(TorchFunctionMode):
    """Under autocast CUDA normalises in float32, the CPU does not; dropout keeps a mask of bytes there, of floats here.

    Also keeps nn.MultiheadAttention off its fast path, which no FLOP formula knows.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **(kwargs or {}))


def by_batch(size: int) -> tuple[int, int, int]:
    """A size at PROBE_BATCH as (constant, per sample, per pair of samples)."""
    if size % PROBE_BATCH:
        return size, 0, 0
    if size % PROBE_BATCH**2:
        return 0, size // PROBE_BATCH, 0
    return 0, 0, size // PROBE_BATCH**2


def at_batch(sizes: np.ndarray, batch_size: int, num_processes: int = 1) -> np.ndarray:
    """(..., 3) as by_batch gives it -> sizes at a batch per process; pairs: own samples with those of all processes."""
    return sizes @ np.array([1, batch_size, batch_size**2 * num_processes])


class Stack:
    """Five blocks that ran instead of 5 + copies equal ones: the third stands for `copies` more behind it.

    `steps` has (number of changes, FLOPs) at the start of the third to fifth block's forward, and of the third to first
    block's backward.
    """

    def __init__(self, copies: int):
        self.copies = copies
        self.steps: dict[str, tuple[int, np.ndarray]] = {}

    def is_running(self) -> bool:
        """Whether the third block runs, forward or backward: what is made now is made in each further block, too."""
        return len(self.steps) in (1, 4)

    def flops(self) -> np.ndarray:
        """FLOPs of the further blocks so far: forward, or forward and backward."""
        at = {name: flops for name, (_, flops) in self.steps.items()}
        return self.copies * sum(
            at[f"{way} 1"] - at[f"{way} 0"] for way in ("forward", "backward") if f"{way} 1" in at
        )

    def live(self, made_here: np.ndarray) -> np.ndarray:
        """Live bytes of the further blocks, from those of what the third block made: N x 3 both.

        Exact where a peak can be. While the third block runs forward the others don't exist; what it leaves to the
        next block to free exists once, not once a block; the same backward, where the others run before the third.
        """
        live, at = made_here.copy(), {name: number for name, (number, _) in self.steps.items()}
        live[: at["forward 1"]] = 0
        live[at["forward 1"] : at["forward 2"]] = live[at["forward 2"]]
        if "backward 2" in at:
            live[at["backward 0"] : at["backward 2"]] = live[at["backward 2"]]
        return self.copies * live


class Recorder(TorchDispatchMode):
    """Changes of the live bytes in order, and FLOPs, as by_batch gives them."""

    def __init__(self):
        super().__init__()
        self.changes: list[tuple[int, int, int]] = [(0, 0, 0)]
        self.made_by: list[Stack | None] = [
            None
        ]  # of each change: whose third block made the storage
        self.stacks: list[Stack] = []
        self.in_backward = False
        self._flops = np.zeros(3, dtype=np.int64)
        self._storages: dict[int, ref | None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self._flops = self._flops + by_batch(formula(*args, **kwargs, out_val=output))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which are there from the start to the end."""
        self._storages |= {tensor.untyped_storage()._cdata: None for tensor in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            maker = next((stack for stack in self.stacks if stack.is_running()), None)
            self._storages[key] = ref(storage, partial(self._free, key, len(self.changes)))
            self.changes.append(by_batch(storage.nbytes()))
            self.made_by.append(maker)

    def _free(self, key: int, made_at: int, _: ref) -> None:
        del self._storages[key]
        self.changes.append(tuple(-size for size in self.changes[made_at]))
        self.made_by.append(self.made_by[made_at])

    def watch(self, blocks: nn.ModuleList, copies: int) -> None:
        """Let the third of five blocks stand for `copies` more."""
        stack = Stack(copies)
        self.stacks.append(stack)

        def note(name: str) -> None:
            assert name not in stack.steps, f"{name}: these blocks ran twice"
            stack.steps[name] = len(self.changes), self._flops

        def before_forward(name: str, *_) -> None:
            if (
                not self.in_backward
            ):  # there it is activation checkpointing that runs the block again
                note(name)

        def after_forward(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not self.in_backward and output.requires_grad:
                output.register_hook(
                    lambda gradient: note(name)
                )  # called when the gradient of the output is there

        for step in range(3):
            blocks[2 + step].register_forward_pre_hook(partial(before_forward, f"forward {step}"))
            blocks[2 - step].register_forward_hook(partial(after_forward, f"backward {step}"))

    def flops(self) -> np.ndarray:
        """FLOPs so far."""
        return self._flops + sum(stack.flops() for stack in self.stacks)

    def live(self) -> np.ndarray:
        """Live bytes after each change so far: N x 3."""
        changes = np.array(self.changes, dtype=np.int64)
        live = changes.cumsum(axis=0)
        for stack in (stack for stack in self.stacks if stack.steps):  # the others did not run
            is_ours = np.array([maker is stack for maker in self.made_by])
            live = live + stack.live((changes * is_ours[:, None]).cumsum(axis=0))
        return live


@dataclass
class Cost:
    """What was measured; all as by_batch gives it, for at_batch."""

    forward_flops: np.ndarray  # (3,)
    training_flops: np.ndarray  # (3,), forward and backward, of the opponent as well
    kept_bytes: np.ndarray  # (3,), live when the backward pass starts
    live_bytes: np.ndarray  # N x 3, over the step, beyond what is there from its start to its end

    def peak_bytes(self, batch_size: int, num_processes: int = 1) -> int:
        """Most that is live at once at a batch per process and pass."""
        return int(at_batch(self.live_bytes, batch_size, num_processes).max())


def cut_stacks(module: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Shorten each stack of more than RUN_BLOCKS equal blocks to that: (stack, number of blocks removed)."""
    cut = []
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) > RUN_BLOCKS:
            shapes = [
                [(type(part), [p.shape for p in part.parameters()]) for part in b.modules()]
                for b in blocks
            ]
            if all(shape == shapes[0] for shape in shapes):
                cut.append((blocks, len(blocks) - RUN_BLOCKS))
                del blocks[RUN_BLOCKS:]
    return cut


@contextmanager
def fake_run(build: Callable[[], Workload]):
    """(workload, recorder) with stacks cut short; the recorder is not yet recording."""
    with torch.device("meta"):
        work, recorder = build(), Recorder()
    with FakeTensorMode(), CudaLike():
        for module in (*work.players(), *work.frozen):
            for blocks, copies in cut_stacks(module):
                recorder.watch(blocks, copies)
            module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            recorder.ignore((*module.parameters(), *module.buffers()))
        yield work, recorder


def autocast(precision: str) -> torch.autocast:
    """Autocast of a run's precision, "fp32" or "bf16", on fake tensors."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def prepare(module: nn.Module, precision: str, has_gradients: bool) -> torch.optim.Optimizer:
    """Wrap the forward as accelerate does, and make the optimiser with its moments; gradients stay if told so."""
    if precision == "bf16":
        module.forward = convert_outputs_to_fp32(autocast(precision)(module.forward))
    optimizer = build_optimizer(module.train(), OptimizerConfig())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not has_gradients:
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def measure_step(
    build: Callable[[], Workload], precision: str, has_gradients: bool = False
) -> Cost:
    """One optimiser step of one pass, after another one: the moments are there.

    has_gradients: so are the gradients, as in the later passes of gradient accumulation; live_bytes is without them.
    """
    with fake_run(build) as (work, recorder):
        optimizers = [prepare(player, precision, has_gradients) for player in work.players()]
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                recorder.ignore(state.values())
                recorder.ignore([parameter.grad] if has_gradients else [])
        with recorder:
            terms = work.loss_fn(work.model, work.make_batch(PROBE_BATCH))
            kept, forward_flops = recorder.live()[-1], recorder.flops()
            recorder.in_backward = True
            terms["loss"].backward()
            terms = None
            if work.opponent is not None:
                work.opponent_loss_fn(work.opponent)["loss"].backward()
            training_flops = recorder.flops()
            for optimizer, player in zip(optimizers, work.players(), strict=True):
                torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return Cost(forward_flops, training_flops, kept, recorder.live())


def measure_forward(build: Callable[[], Workload]) -> Cost:
    """loss_fn without gradients, in eval mode and float32."""
    with fake_run(build) as (work, recorder), torch.no_grad():
        work.model.eval()
        with recorder:
            output = work.loss_fn(work.model, work.make_batch(PROBE_BATCH))
            kept = recorder.live()[-1]
            del output
    return Cost(recorder.flops(), recorder.flops(), kept, recorder.live())
