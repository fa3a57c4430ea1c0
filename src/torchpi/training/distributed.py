"""Training in several processes: who they are, and how model and gradients are spread over them.

Every process computes its part of each batch. "ddp" keeps the whole model in each and averages the gradients; "fsdp"
keeps a part of every weight, gradient and moment in each (FSDP2, `fully_shard`); "hybrid" does so within groups of
processes, usually those of a node, and averages over the groups. What is computed is the same in all three.
"""

import contextlib
import dataclasses
import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from torchpi.errors import TrainingError
from torchpi.model.gemma import AdaRMSNorm, RMSNorm
from torchpi.model.lora import LoraLinear
from torchpi.model.pi0 import Pi0
from torchpi.policy import usable_device
from torchpi.training.memory import layers

PATIENCE = datetime.timedelta(days=1)
"""For how long processes wait for one that writes, downloads or simulates. One that has ended is noticed at once."""


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is."""

    rank: int
    size: int
    device: torch.device
    group: Any
    """A process group on the CPU, with `PATIENCE`."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Until all processes are here, however long one of them takes."""
        dist.barrier(group=self.group)


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun has started; without torchrun this one is alone.

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
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            yield World(dist.get_rank(), dist.get_world_size(), own, group)
    finally:
        dist.destroy_process_group()


@runtime_checkable
class Forward(Protocol):
    """`Pi0.forward`, spread over the processes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Pi0.forward`."""
        ...


class _WithForward(nn.Module):
    """What DistributedDataParallel needs: a forward."""

    def __init__(self, model: Pi0) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs) if args else self._zero()

    def _zero(self) -> Tensor:
        """A zero that depends on all trained parameters, whose gradients are zero."""
        return torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A model, spread over the processes."""

    forward: Forward
    last_of_update: Callable[[bool], Any]
    """Says of each forward and backward pass whether it is the last one of its update: a context in which it runs."""


def parallelize(model: Pi0, how: str, world: World, *, shard_size: int) -> Parallel:
    """Spread a model over the processes. The first one's weights count; the others' may be on "meta".

    Args:
        model: changed in place: on the world's device, with DTensors as weights where they are sharded.
        how: "ddp", "fsdp" or "hybrid".
        shard_size: processes that share one copy of the model, for "hybrid".
    """
    if how == "ddp":
        return _replicate(model, world)
    mesh = _mesh(how, world, shard_size)
    full = _weights_of_the_first(model, world)
    model.to("meta")
    sharded = _shard(model, mesh)
    model.to_empty(device=world.device)
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))

    @contextlib.contextmanager
    def last_of_update(last: bool) -> Iterator[None]:
        # Gradients are reduced to shards after each pass and add up there, so that whole ones are never kept; over the
        # groups of "hybrid", whose connections are slower, they are summed once.
        sharded.set_requires_all_reduce(last)
        yield

    return Parallel(model, last_of_update)


def alone(model: Pi0) -> Parallel:
    """A model in one process."""
    return Parallel(model, lambda last: contextlib.nullcontext())


def _replicate(model: Pi0, world: World) -> Parallel:
    if world.size == 1:
        return alone(model.to(world.device))
    if world.first:
        model.to(world.device)
    else:
        model.to_empty(device=world.device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    spread = nn.parallel.DistributedDataParallel(_WithForward(model), init_sync=False, gradient_as_bucket_view=True)
    buckets = dict[nn.Parameter, Tensor]()

    @contextlib.contextmanager
    def last_of_update(last: bool) -> Iterator[None]:
        if last:
            yield
            return
        # Gradients add up in the buckets: of their own they would be a second set beside them.
        if not buckets:
            buckets.update(_gradients_in_buckets(spread))
        for parameter, gradient in buckets.items():
            if parameter.grad is None:
                parameter.grad = gradient.zero_()
        with spread.no_sync():
            yield

    return Parallel(spread, last_of_update)


def _gradients_in_buckets(spread: nn.parallel.DistributedDataParallel) -> dict[nn.Parameter, Tensor]:
    """The place of each trained parameter's gradient in the buckets that are summed over the processes."""
    parameters = [parameter for parameter in spread.parameters() if parameter.requires_grad]
    for _ in range(2):  # behind the first backward pass the buckets are laid out anew
        for parameter in parameters:
            parameter.grad = None
        spread().backward()
    found = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter in parameters:
        parameter.grad = None
    return found


def _mesh(how: str, world: World, shard_size: int) -> DeviceMesh:
    if how == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if shard_size < 1 or world.size % shard_size:
        raise TrainingError(
            f"parallel 'hybrid' divides the {world.size} processes into groups of shard_size {shard_size}, which does "
            "not work out; choose a shard_size that divides their number."
        )
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _weights_of_the_first(model: Pi0, world: World) -> dict[str, Any]:
    return {name: value.detach() for name, value in model.state_dict().items()} if world.first else {}


def _shard(model: Pi0, mesh: DeviceMesh) -> FSDPModule:
    for modules, dtype in shard_groups(model):
        # Gradients come in the dtype of the weights, and are summed in float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "sample_actions")
    return sharded


def shard_groups(model: Pi0) -> Iterator[tuple[list[nn.Module], torch.dtype | None]]:
    """What FSDP gathers at once, the inner before the outer, and in which dtype; None: each weight in its own.

    A group for each layer. What is in none is the root's, which is gathered during the whole pass: all that is read
    outside of its layer's forward, and norms, whose weights are used in float32. The others are brought to the dtype of
    the products where they are used, so they can be gathered in it. Not so LoRA matrices: some are added up before.
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
    """Drop the whole weights that FSDP has put together, so that the next pass sees its shards as they are then.

    The root keeps its own, the embedding among them, from a forward pass to the backward pass, and from one without
    gradients for good.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this process saves: where several have the same, each saves some of it, the large ones spread evenly."""
    by_size = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    share = set()
    for place, name in enumerate(by_size):
        number, count = copy_number(tensors[name], world)
        if place % count == number:
            share.add(name)
    return {name: tensor for name, tensor in tensors.items() if name in share}


def copy_number(tensor: Tensor, world: World) -> tuple[int, int]:
    """Which copy of the tensor (or of its shard) this process has, and how many there are."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    number, count = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            number, count = number * size + tensor.device_mesh.get_local_rank(dim), count * size
    return number, count


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, in the same memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, whole: Tensor) -> Tensor:
    """A part of this process as one of a tensor that is sharded as `whole` is."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def sum_over_shards(value: Tensor, sharded: Tensor) -> Tensor:
    """The sum of a value over the processes that share the shards of a tensor, in place."""
    if isinstance(sharded, DTensor):
        for dim, placement in enumerate(sharded.placements):
            if placement.is_shard():
                dist.all_reduce(value, group=sharded.device_mesh.get_group(dim))
    return value


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of numbers over all processes."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))
