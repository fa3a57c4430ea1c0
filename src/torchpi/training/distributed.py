"""Training in several processes.

Every process computes its share of each batch. With "ddp" every process holds the whole model, and gradients are
averaged. With "fsdp" every process holds a shard of every weight, gradient and moment (FSDP2, `fully_shard`). "hybrid"
shards within groups of processes, usually a node, and averages over the groups. All three compute the same updates.
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

LONG_TIMEOUT = datetime.timedelta(days=1)
"""Timeout while another process writes, downloads or simulates. A process that has died is noticed at once."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    group: Any
    """A CPU process group with the timeout `LONG_TIMEOUT`."""

    @property
    def is_main(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, up to `LONG_TIMEOUT`."""
        dist.barrier(group=self.group)


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun has started; without torchrun there is only this one.

    Args:
        device: "cpu", or "cuda" for the GPU of each process's local rank; None: cuda if available.
    """
    own_device, under_torchrun = usable_device(device), "WORLD_SIZE" in os.environ
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    if own_device.type == "cuda":
        if own_device.index is None:
            own_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if under_torchrun else 0)
        torch.cuda.set_device(own_device)
    if under_torchrun:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            # FSDP2 warns about views returned by a module (values, chunks), because they must not be written to.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            if dist.get_rank():
                warnings.simplefilter("ignore")  # the main process shows the warnings
            group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
            yield World(dist.get_rank(), dist.get_world_size(), own_device, group)
    finally:
        # The last owner of a backend joins its threads. DistributedDataParallel, freed later, would do it while holding
        # the GIL, and a thread that waits for the GIL would never end. Python references are freed without the GIL.
        assert dist.group.WORLD is not None
        _latest_backends[:] = [dist.group.WORLD._get_backend(torch.device(kind)) for kind in {"cpu", own_device.type}]
        dist.destroy_process_group()


_latest_backends: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A parallelized model."""

    forward: Callable[..., Tensor]
    """`Pi0.forward`."""
    sync_gradients: Callable[[bool], Any]
    """Context manager for the forward and backward pass of a micro-batch. Its argument is True for the last micro-batch
    of an update, whose backward pass reduces the gradients over the processes."""


def single_process(model: Pi0) -> Parallel:
    """Wrap a model that is trained in one process."""
    return Parallel(model, lambda sync: contextlib.nullcontext())


def parallelize(model: Pi0, strategy: str, world: World, *, shard_size: int) -> Parallel:
    """Distribute a model over the processes.

    Args:
        model: moved to the device and sharded in place. The main process's weights are distributed; the other processes
            may have theirs on "meta".
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
        # One array at a time: the main process frees it before distributing the next one.
        target = parameter.detach()
        assert isinstance(target, DTensor)
        array = whole.pop(name) if world.is_main else torch.empty(target.shape, dtype=target.dtype, device=world.device)
        array = array.to(world.device)
        target.to_local().copy_(distribute_tensor(array, mesh, target.placements).to_local())

    @contextlib.contextmanager
    def sync_gradients(sync: bool) -> Iterator[None]:
        # Gradients are reduced to shards after each micro-batch and accumulate there, so no process keeps unsharded
        # ones. The groups of "hybrid", whose connections are slower, all-reduce only once per update.
        sharded.set_requires_all_reduce(sync)
        yield

    return Parallel(model, sync_gradients)


class _ForDDP(nn.Module):
    """A model for DistributedDataParallel; without arguments it returns a zero that depends on all parameters."""

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
        # Gradients accumulate in the buckets: separate gradients would take their memory a second time.
        if not buckets:
            buckets.update(_gradients_in_buckets(ddp))
        for parameter, gradient in buckets.items():
            if parameter.grad is None:
                parameter.grad = gradient.zero_()
        with ddp.no_sync():
            yield

    return Parallel(ddp, sync_gradients)


def _gradients_in_buckets(ddp: nn.parallel.DistributedDataParallel) -> dict[nn.Parameter, Tensor]:
    """The view of each trainable parameter's gradient in the all-reduce buckets."""
    parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    gradients: dict[nn.Parameter, Tensor] = {}
    for _ in range(2):  # DDP rebuilds the buckets after the first backward pass
        ddp().backward()
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in parameters:
            parameter.grad = None
    return gradients


def num_shards(strategy: str, world_size: int, shard_size: int) -> int:
    """Number of processes that share one copy of the model."""
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
        # Gradients arrive in the dtype of the gathered weights, and are reduced in float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "sample_actions")
    return sharded


def shard_groups(model: Pi0) -> Iterator[tuple[list[nn.Module], torch.dtype | None]]:
    """Groups of modules that FSDP gathers together, inner ones first, and the dtype to gather them in.

    Each layer is a group, gathered in the dtype of the matmuls, to which its weights are cast where they are used. A
    layer with LoRA matrices has None instead (each weight's own dtype), because some of its weights are summed before
    the cast. All other weights belong to the root, which stays gathered during the whole forward pass: weights that are
    read outside of their layer's forward, and norms, whose weights are used in float32.
    """
    compute = None if model.compute_dtype is torch.float32 else model.compute_dtype
    for norm in model.modules():
        if isinstance(norm, AdaRMSNorm):  # the conditioning of all layers is computed before the first layer
            yield [norm.dense], compute
    for layer in layers(model):
        has_lora = any(isinstance(module, LoraLinear) for module in layer.modules())
        children = list(layer.children())
        without_norms = [child for child in children if not isinstance(child, RMSNorm | nn.LayerNorm)]
        modules = [layer] if len(without_norms) == len(children) else without_norms
        yield modules, None if has_lora else compute


def release_gathered(model: nn.Module) -> None:
    """Free the weights that FSDP has gathered, so that the next forward pass gathers the current shards.

    The root keeps its weights (such as the embedding) gathered until the backward pass; after a forward pass without
    gradients it would keep them forever.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, without waiting for the device's queued work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from pageable memory are synchronous
    return tensor.to(device, non_blocking=True)


def own_share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors that this process saves: processes with identical copies take turns, from the largest tensor on."""
    by_size = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    names = set()
    for position, name in enumerate(by_size):
        copy, num_copies = copy_number(tensors[name], world)
        if position % num_copies == copy:
            names.add(name)
    return {name: tensor for name, tensor in tensors.items() if name in names}


def copy_number(tensor: Tensor, world: World) -> tuple[int, int]:
    """The number of this process's copy of a tensor (or of its shard), and the number of identical copies."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    number, count = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            number, count = number * size + tensor.device_mesh.get_local_rank(dim), count * size
    return number, count


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, as a view; a tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """Sum each number over all processes."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))
