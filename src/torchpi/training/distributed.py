"""Training in several processes.

Every process computes its part of each batch. "ddp" keeps the whole model in each and averages the gradients; "fsdp"
keeps a shard of every weight, gradient and moment in each (FSDP2, `fully_shard`); "hybrid" does so within groups of
processes, usually those of a node, and averages over the groups. All three compute the same.
"""

import contextlib
import dataclasses
import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from torchpi.devices import usable_device
from torchpi.errors import TrainingError
from torchpi.model.gemma import AdaRMSNorm, RMSNorm
from torchpi.model.lora import LoraLinear
from torchpi.model.pi0 import Pi0
from torchpi.training.activation_checkpointing import layers

PATIENCE = datetime.timedelta(days=1)
"""Timeout for a process that writes, downloads or simulates. One that has ended is noticed at once."""


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int
    size: int
    device: torch.device
    group: Any
    """A process group on the CPU, with `PATIENCE`."""

    @property
    def is_main(self) -> bool:
        """This process writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, however long one of them takes."""
        dist.barrier(group=self.group)


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun has started; without torchrun there is one.

    Args:
        device: "cpu", or "cuda": then each process has the GPU of its local rank; None: cuda where there is one.
    """
    own, several = usable_device(device), "WORLD_SIZE" in os.environ
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    if own.type == "cuda":
        if own.index is None:
            own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if several else 0)
        torch.cuda.set_device(own)
    if several:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            # FSDP2 warns of views that leave a module (values, chunks), because nobody may write to them; nobody does.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            if dist.get_rank():
                warnings.simplefilter("ignore")  # the main process gives them
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            yield World(dist.get_rank(), dist.get_world_size(), own, group)
    finally:
        # What owns a backend last joins its threads. DistributedDataParallel, freed later, would do it with the
        # interpreter's lock, for which one of them may wait; Python's own reference is freed without it.
        assert dist.group.WORLD is not None
        _latest_backends[:] = [dist.group.WORLD._get_backend(torch.device(kind)) for kind in {"cpu", own.type}]
        dist.destroy_process_group()


_latest_backends: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A parallelized model."""

    forward: Callable[..., Tensor]
    """`Pi0.forward`."""
    sync_gradients: Callable[[bool], Any]
    """A context for the forward and backward pass of a micro-batch: True for the last one of an update, which sums the
    gradients over the processes."""


def single_process(model: Pi0) -> Parallel:
    """A model in one process."""
    return Parallel(model, lambda sync: contextlib.nullcontext())


def parallelize(model: Pi0, strategy: str, world: World, *, shard_size: int) -> Parallel:
    """Distribute a model over the processes. The main one's weights count; the others' may be on "meta".

    Args:
        model: changed in place: on the world's device, with DTensors as weights where they are sharded.
        shard_size: processes that share one copy of the model, for "hybrid".
    """
    if strategy == "ddp":
        return _replicate(model, world)
    shards = num_shards(strategy, world.size, shard_size)
    sizes = {"replicate": world.size // shards, "shard": shards} if strategy == "hybrid" else {"shard": shards}
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    whole = {name: value.detach() for name, value in model.named_parameters()} if world.is_main else {}
    model.to("meta")
    sharded = _shard(model, mesh)
    model.to_empty(device=world.device)
    for name, parameter in model.named_parameters():
        # One after the other: an array of the main process is freed before the next one is distributed.
        target = parameter.detach()
        assert isinstance(target, DTensor)
        array = whole.pop(name) if world.is_main else torch.empty(target.shape, dtype=target.dtype, device=world.device)
        array = array.to(world.device)
        target.to_local().copy_(distribute_tensor(array, mesh, target.placements).to_local())

    @contextlib.contextmanager
    def sync_gradients(sync: bool) -> Iterator[None]:
        # Gradients are reduced to shards after each micro-batch and add up there, so that whole ones are never kept;
        # over the groups of "hybrid", whose connections are slower, they are summed once.
        sharded.set_requires_all_reduce(sync)
        yield

    return Parallel(model, sync_gradients)


class _ForDDP(nn.Module):
    """A model for DistributedDataParallel, which without arguments returns a zero that depends on all parameters."""

    def __init__(self, model: Pi0) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            return self.model(*args, **kwargs)
        return torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()


def _replicate(model: Pi0, world: World) -> Parallel:
    if world.size == 1:
        return single_process(model.to(world.device))
    if world.is_main:
        model.to(world.device)
    else:
        model.to_empty(device=world.device)
    ddp = nn.parallel.DistributedDataParallel(_ForDDP(model), gradient_as_bucket_view=True)  # broadcasts the weights
    buckets = dict[nn.Parameter, Tensor]()

    @contextlib.contextmanager
    def sync_gradients(sync: bool) -> Iterator[None]:
        if sync:
            yield
            return
        # Gradients add up in the buckets: of their own they would be a second set.
        if not buckets:
            buckets.update(_gradients_in_buckets(ddp))
        for parameter, gradient in buckets.items():
            if parameter.grad is None:
                parameter.grad = gradient.zero_()
        with ddp.no_sync():
            yield

    return Parallel(ddp, sync_gradients)


def _gradients_in_buckets(ddp: nn.parallel.DistributedDataParallel) -> dict[nn.Parameter, Tensor]:
    """Each trainable parameter's gradient in the buckets that are summed over the processes."""
    parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    found: dict[nn.Parameter, Tensor] = {}
    for _ in range(2):  # after the first backward pass the buckets are laid out anew
        ddp().backward()
        found = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in parameters:
            parameter.grad = None
    return found


def num_shards(strategy: str, world_size: int, shard_size: int) -> int:
    """The processes that share one copy of the model."""
    if strategy != "hybrid":
        return {"ddp": 1, "fsdp": world_size}[strategy]
    if shard_size < 1 or world_size % shard_size:
        raise TrainingError(
            f"parallel 'hybrid' can't divide the {world_size} processes into groups of shard_size {shard_size}; choose "
            "a shard_size that divides their number."
        )
    return shard_size


def _shard(model: Pi0, mesh: DeviceMesh) -> FSDPModule:
    for modules, dtype in shard_groups(model):
        # Gradients come in the dtype of the weights, and are summed in float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "sample_actions")
    return sharded


def shard_groups(model: Pi0) -> Iterator[tuple[list[nn.Module], torch.dtype | None]]:
    """Modules that FSDP gathers at once, inner ones first, and the dtype in which; None: each weight's own.

    A group per layer. The rest is the root's, which is gathered during the whole forward pass: all that is read outside
    of its layer's forward, and norms, whose weights are used in float32. The others are cast to the dtype of the
    matmuls where they are used, so they can be gathered in it. Not so LoRA matrices: some are added up before.
    """
    compute = None if model.compute_dtype is torch.float32 else model.compute_dtype
    for norm in model.modules():
        if isinstance(norm, AdaRMSNorm):  # all conditions are computed before the first layer
            yield [norm.dense], compute
    for layer in layers(model):
        has_lora = any(isinstance(module, LoraLinear) for module in layer.modules())
        others = [child for child in layer.children() if not isinstance(child, RMSNorm | nn.LayerNorm)]
        yield [layer] if len(others) == len(list(layer.children())) else others, None if has_lora else compute


def release_gathered(model: nn.Module) -> None:
    """Drop the whole weights that FSDP has gathered, so that the next forward pass sees its shards as they are then.

    The root keeps its own, the embedding among them, from a forward pass to the backward pass, and from one without
    gradients for good.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # of other memory a copy waits
    return tensor.to(device, non_blocking=True)


def own_share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors that this process saves: of copies each process saves some, the large ones spread evenly."""
    by_size = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    share = set()
    for position, name in enumerate(by_size):
        number, count = copy_number(tensors[name], world)
        if position % count == number:
            share.add(name)
    return {name: tensor for name, tensor in tensors.items() if name in share}


def copy_number(tensor: Tensor, world: World) -> tuple[int, int]:
    """The number of this process' copy of a tensor (or of its shard), and the number of copies."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    number, count = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            number, count = number * size + tensor.device_mesh.get_local_rank(dim), count * size
    return number, count


def local(tensor: Tensor) -> Tensor:
    """This process' shard of a tensor, in the same memory; the whole where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of numbers over all processes."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))
