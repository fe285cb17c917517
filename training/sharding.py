"""Fully sharded training (training.shard=full): FSDP2 of torch, with one part on each process.

Weights, gradients, moments and the EMA are split along their first dimension. The weights of a
block are gathered for its forward pass and again for its backward pass, which averages its
gradients into the parts; all other weights are there from the first to the last block. Scalars
stay whole. Parts are DTensors, which know the shape of the whole; checkpoints hold wholes.
torch's modules for this take a second to import, which only sharded runs do.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard_network(module: nn.Module, device: torch.device) -> nn.Module:
    """Leave this process's part of a network's weights; returns a copy with such parts for an EMA.

    The weights of the main process count. `load_state_dict` of both goes on taking wholes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    # As DDP does: a part of each process would make no network if they differed.
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)

    # FSDP's modules cannot be copied, so the copy comes before.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def split(weight: Tensor) -> Tensor:
        if not weight.ndim:
            return weight.clone()
        return distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).clone()

    average = replace_parameters(module, split)

    # Inner lists of blocks before outer ones, then what is left; FSDP can't split scalars.
    scalars = {weight for weight in module.parameters() if not weight.ndim}
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for part in (*(block for blocks in reversed(lists) for block in blocks), module):
        fully_shard(part, mesh=mesh, ignored_params=scalars)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # no loss writes into an output
    for each in (module, average):
        each.register_load_state_dict_pre_hook(split_loaded)
    return average


def replace_parameters(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module with replace(weight) in place of each weight, frozen."""
    weights = {
        id(weight): nn.Parameter(replace(weight.detach()), requires_grad=False)
        for weight in module.parameters()
    }
    return copy.deepcopy(module, weights)


def gather_network(module: nn.Module) -> nn.Module:
    """A copy with whole weights, or the module itself if it has no parts; all processes call it."""
    # For pictures and evaluations, whose samplers know nothing of parts.
    if not any(map(is_part, module.parameters())):
        return module
    return replace_parameters(module, gather)


def split_like(whole: Tensor, part: Tensor) -> Tensor:
    """This process's part of a tensor that all have, laid out like `part`; scalars stay whole."""
    if not is_part(part) or not whole.ndim:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # A copy: a view would keep the whole alive.
    return distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None).clone()


def split_loaded(module: nn.Module, tensors: dict[str, Tensor], *_) -> None:
    """A hook of load_state_dict: take parts of the wholes."""
    for name, weight in module.named_parameters():
        if name in tensors:
            tensors[name] = split_like(tensors[name], weight)


def is_part(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """The whole of a part; all processes call it. Other tensors are whole."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def clip_gradients(weights: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """nn.utils.clip_grad_norm_ of parts, by the norm of all of them; scalars are averaged first."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    parts = [each.to_local() for each in gradients if is_part(each)]
    scalars = [each for each in gradients if not is_part(each)]

    # One exchange for all: FSDP has averaged the parts, and leaves the scalars alone.
    square = torch.stack(torch._foreach_norm(parts)).square().sum()
    sums = torch.stack([square, *(each / dist.get_world_size() for each in scalars)])
    dist.all_reduce(sums)
    for scalar, mean in zip(scalars, sums[1:], strict=True):
        scalar.copy_(mean)

    # As clip_grad_norm_ does, without asking the device whether it is needed.
    norm = (sums[0] + sums[1:].square().sum()).sqrt()
    torch._foreach_mul_([*parts, *scalars], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
