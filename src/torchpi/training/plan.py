"""The memory of a training run, before anything is allocated.

The run's own code is run on tensors without numbers (an update, a measurement), and what lives is counted: every
storage from the operation that makes it until the last reference to it is gone. Where several processes share a model,
its parts follow from the shapes. Not counted is what no tensor holds: CUDA's context, the workspaces of cuBLAS and
NCCL, what the allocator can't use of its blocks, and with `compile` what the compiler saves or takes.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpi.checkpoints.load import published_name
from torchpi.config import Pi0Config
from torchpi.model.pi0 import Pi0
from torchpi.robots import get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import alone, shard_groups
from torchpi.training.holdout import DRAWS as HOLDOUT_DRAWS
from torchpi.training.loop import update
from torchpi.training.memory import checkpoint_activations
from torchpi.training.optim import Kind
from torchpi.training.samples import Batch, loss_sum
from torchpi.training.state import TrainState
from torchpi.training.weights import begin_model, model_config
from torchpi.types import Observation

USABLE = 0.93
"""Share of a device's memory that tensors may take; a rule of thumb for what is not counted."""

Moment = Literal["update", "measurement"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a process on its device, at the moment at which they are most."""

    moment: Moment
    """While weights are updated, or while the held-out samples are measured."""
    weights: int
    gradients: int
    """Those that are there at that moment; at the end of the forward pass of an update's first batch none is."""
    optimizer: int
    """Its moments."""
    ema: int
    data: int
    """The batches of an update, and the held-out samples."""
    activations: int
    """All else that lives: what the backward pass needs, copies of weights in the dtype of the matmuls included."""
    gathered: int
    """Whole weights and gradients of the layers at work, where the model is sharded."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, name) for name in _KINDS)


_KINDS = ("weights", "gradients", "optimizer", "ema", "data", "activations", "gathered")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A recipe that differs in a few fields."""

    fields: Mapping[str, Any]
    total: int
    """Bytes per device."""
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs."""

    device: str
    world_size: int
    samples: int
    """That a process computes at once."""
    cameras: tuple[str, ...]
    prompt_tokens: int
    """Of each sample: as many as the model takes, which is the most that a prompt can have."""
    peak: Memory
    staged: int
    """Bytes of host memory for the copy of a checkpoint that is being written, in each process."""
    constant: int
    """Bytes of host memory for the weights that the run does not change, which the first process keeps for its
    policies; none of their own where the model is on the CPU."""
    device_memory: int | None
    """Bytes that a process can have on its device; None: not known."""
    alternatives: tuple[Alternative, ...] = ()
    """If it does not fit: what else was looked at."""

    @property
    def needed(self) -> int:
        """Bytes of the device's memory; on the CPU the copy of a checkpoint is there as well."""
        return self.peak.total + (self.staged if self.device == "cpu" else 0)

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough, with some room for what is not counted; None: its size is not known."""
        return None if self.device_memory is None else self.needed <= USABLE * self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        document = dataclasses.asdict(self)
        document["peak"]["total"] = self.peak.total
        return {**document, "needed": self.needed, "fits": self.fits}


def plan(config: TrainConfig, *, world_size: int, local_world_size: int, device_memory: int | None = None) -> Plan:
    """The memory of a run; no dataset is opened, and no weights are read.

    Args:
        config: the recipe. Of its datasets only the embodiments are looked at.
        world_size: processes that share the run.
        local_world_size: those of a node, for "hybrid" without `shard_size`.
        device_memory: bytes that a process can have on its device; without it the plan doesn't say whether it fits.

    Raises:
        ValueError: the batch can't be divided among the processes, or the recipe names no robot.
    """
    found = _plan(config, world_size, local_world_size, device_memory)
    if found.fits is not False:
        return found

    def looked_at(series: Iterable[Mapping[str, Any]]) -> Iterator[Alternative]:
        """Each goes further than the one before; the first one that fits is enough."""
        for fields in series:
            other = _plan(dataclasses.replace(config, **fields), world_size, local_world_size, device_memory)
            yield Alternative(fields, other.needed, bool(other.fits))
            if other.fits:
                return

    others = [other for series in _single_changes(config, world_size) for other in looked_at(series)]
    if not any(other.fits for other in others):
        others += looked_at(_together(config, world_size))
    return dataclasses.replace(found, alternatives=tuple(others))


def _single_changes(config: TrainConfig, world_size: int) -> Iterator[list[dict[str, Any]]]:
    kinds = ("none", "selective", "layers")  # each keeps less
    yield [{"checkpointing": kind} for kind in kinds[kinds.index(config.checkpointing) + 1 :]]
    yield [{"accumulate": count} for count in _more_passes(config, world_size)]
    if config.ema_decay:
        yield [{"ema_decay": 0.0}]
    if config.parallel == "ddp" and config.optimizer == "adamw":
        yield [{"optimizer": "adamw8bit"}]
    if config.parallel != "fsdp" and config.optimizer == "adamw" and world_size > 1:
        yield [{"parallel": "fsdp"}]
    yield [{"trained": kind} for kind in _less_trained(config)]


def _together(config: TrainConfig, world_size: int) -> Iterator[dict[str, Any]]:
    fields: dict[str, Any] = {"checkpointing": "layers"}
    if passes := _more_passes(config, world_size):
        fields["accumulate"] = passes[-1]
    yield dict(fields)
    if world_size > 1 and config.optimizer == "adamw":
        yield {**fields, "parallel": "fsdp"}
    fields["ema_decay"] = 0.0
    if config.parallel == "ddp":
        fields["optimizer"] = "adamw8bit"
    yield dict(fields)
    for kind in _less_trained(config):
        yield {**fields, "trained": kind}


def _more_passes(config: TrainConfig, world_size: int) -> list[int]:
    """Twice as many, and so on, while the samples can be divided."""
    counts, passes = [], 2 * config.accumulate
    while config.batch_size % (world_size * passes) == 0:
        counts.append(passes)
        passes *= 2
    return counts


def _less_trained(config: TrainConfig) -> list[str]:
    if config.init is None or config.trained == "lora_strict":
        return []  # low-rank matrices learn beside trained weights
    return ["lora_strict"] if config.trained == "lora" else ["lora", "lora_strict"]


def _plan(config: TrainConfig, world_size: int, local_world_size: int, device_memory: int | None) -> Plan:
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} can't be divided by {world_size} processes × {config.accumulate} passes"
        )
    sizes, cameras = _sizes(config), _cameras(config)
    shards = {"ddp": 1, "fsdp": world_size, "hybrid": config.shard_size or local_world_size}[config.parallel]
    model, _ = begin_model(config, sizes, skeleton=True)
    device = _device_type(config)
    whole_gradients = config.parallel == "ddp" and world_size > 1
    live = _Live(shards, gradients_always=whole_gradients)
    groups = [] if config.parallel == "ddp" else _groups(model)
    frozen = sum(_bytes(p) for p in model.parameters() if not p.requires_grad)
    with _without_numbers(device) as stand_in, live:
        peak = _run(model, config, sizes, cameras, world_size, live, torch.device(stand_in), groups)
    peak = max(peak, _end_of_backward(peak, model, live, groups[-1]), key=lambda m: m.total) if groups else peak
    trained = sum(_shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
    return Plan(
        device=device,
        world_size=world_size,
        samples=config.batch_size // parts,
        cameras=cameras,
        prompt_tokens=sizes.require("max_token_len"),
        peak=peak,
        staged=trained + peak.optimizer + peak.ema,
        constant=0 if device == "cpu" else frozen,
        device_memory=device_memory,
    )


def _sizes(config: TrainConfig) -> Pi0Config:
    """Of a published checkpoint they are known by its name, so that nothing is downloaded."""
    if config.init is not None and (name := published_name(config.init)) is not None:
        config = dataclasses.replace(config, init=None, trained="all", model=config.model or name)
    return model_config(config)


def _cameras(config: TrainConfig) -> tuple[str, ...]:
    if not all(source.embodiment for source in config.sources):
        raise ValueError("a plan needs the robot, for the number of its cameras: --embodiment")
    names = (name for source in config.sources for name in get_embodiment(source.embodiment).camera_names)
    return tuple(dict.fromkeys(names))


# ---- what lives ----


class _Live(TorchDispatchMode):
    """The bytes of all tensors that live, by what they are, and what they were when they were most."""

    def __init__(self, shards: int, *, gradients_always: bool) -> None:
        """
        Args:
            shards: processes that share what belongs to a weight.
            gradients_always: they are in buckets that stay, as DistributedDataParallel has them.
        """
        super().__init__()
        self.shards, self.gradients_always = shards, gradients_always
        self.of_parts = False
        """Whether what is computed now is computed of each process' shards."""
        self.in_reduction = 0
        """Bytes of the gradients that are being summed over the processes."""
        self.now = dict.fromkeys(_KINDS, 0)
        self.most = dict(self.now)
        self.moment: Moment = "update"
        self.most_moment: Moment = "update"
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._gathered_dtypes: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # there is no number: a norm that is cut, a loss that is finite
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                nbytes = 0 if self._is_gathered(func, args, tensor) else tensor.untyped_storage().nbytes()
                self.count(tensor, "activations", _shard_bytes(tensor, self.shards) if self.of_parts else nbytes)
        return out

    def take_for_gathered(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Copies of these weights in this dtype are what is gathered, and not kept."""
        for parameter in parameters:
            self._gathered_dtypes[parameter.untyped_storage()._cdata] = dtype

    def gathered_now(self, nbytes: int) -> None:
        """So many bytes are whole from now on, of what is sharded."""
        self.now["gathered"] = nbytes
        self._note_most()

    def _is_gathered(self, func: Any, args: Any, made: Tensor) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        return self._gathered_dtypes.get(args[0].untyped_storage()._cdata) is made.dtype

    def count(self, tensor: Tensor, kind: str, nbytes: int) -> None:
        """Count a tensor's storage as `nbytes` of a kind, for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, nbytes
        self.now[kind] += nbytes
        self._note_most()

    def _note_most(self) -> None:
        if sum(self.now.values()) > sum(self.most.values()):
            self.most, self.most_moment = dict(self.now), self.moment

    def count_part(self, tensor: Tensor, kind: str) -> None:
        """The same for a tensor of which this process has its shard."""
        self.count(tensor, kind, _shard_bytes(tensor, self.shards))

    def count_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count what becomes a parameter's gradient as such, from now on."""

        def made(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self.gradients_always:
                self.count(parameter.grad, "gradients", 0)  # added to what is in the bucket
            else:
                self.count_part(parameter.grad, "gradients")

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(made)
            if self.gradients_always:
                self.now["gradients"] += _bytes(parameter)

    def begin(self) -> None:
        """What has lived so far, while the run was put together, does not count."""
        self.most = dict(self.now)

    def _forget(self, key: int) -> None:
        if key in self._known:
            _, kind, nbytes = self._known.pop(key)
            self.now[kind] -= nbytes

    def result(self) -> Memory:
        """The moment at which they were most."""
        return Memory(self.most_moment, **self.most)


@contextlib.contextmanager
def _without_numbers(device: str) -> Iterator[str]:
    """Tensors have shapes alone; the device on which to make them."""
    if device == "cpu":
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield "cpu"
    else:
        # Not tensors that pretend to be on CUDA: where it is missing, autograd can't run them. On "meta" PyTorch writes
        # attention's products out; a mode that replaces it would be off in the backward pass, which runs layers again.
        with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
            yield "meta"


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Attention as CUDA's fused kernels have it, of which the backward pass needs the output and a number per row.

    Which of the kernels CUDA takes does not matter here.
    """
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = attention(q, k, v, bias, torch.is_grad_enabled())[0]
    return out


# ---- the run ----


def _run(
    model: Pi0,
    config: TrainConfig,
    sizes: Pi0Config,
    cameras: tuple[str, ...],
    world_size: int,
    live: _Live,
    device: torch.device,
    groups: Sequence["_Group"],
) -> Memory:
    """An update, which finds the moments as those behind the first one do, and a measurement."""
    config = dataclasses.replace(config, loss="all")  # how many terms are real is a number
    model.to_empty(device=device)
    checkpoint_activations(model, config.checkpointing)
    parallel = alone(model)
    state = TrainState.begin(model, weight_decay=config.weight_decay, ema=config.ema_decay > 0)
    state.optimizer = _Moments(state.parts, config.optimizer, live)
    for parameter in model.parameters():
        live.count_part(parameter, "weights")
    if groups:
        _follow(groups, live)
    for average in state.ema.values():
        live.count_part(average, "ema")
    live.count_gradients(state.trained.values())
    live.begin()

    def batch(samples: int, draws: int) -> Batch:
        made = example_batch(sizes, cameras, samples, draws, device)
        for tensor in made.to_tensors().values():
            live.count(tensor, "data", _bytes(tensor))
        return made

    samples = config.batch_size // (world_size * config.accumulate)
    if config.holdout and device.type == "cpu":  # elsewhere they wait in the host's memory
        passes = math.ceil(config.holdout_samples / (samples * world_size))
        waiting = held_out_images(sizes, cameras, passes * samples)
        live.count(waiting, "data", _bytes(waiting))
    batches = [batch(samples, config.num_draws) for _ in range(config.accumulate)]
    update(state, config, batches[:2], parallel)  # all passes behind the first one find its gradients
    live.moment = "measurement"
    if config.holdout:
        with contextlib.ExitStack() as stack, torch.no_grad():
            live.of_parts = True
            stack.enter_context(state.averaged_weights())
            live.of_parts = False
            loss_sum(parallel.flow_error, batch(samples, HOLDOUT_DRAWS), config.loss)
            if config.chunk_samples:  # sampling: the same passes, without several draws
                loss_sum(parallel.flow_error, batch(min(samples, config.chunk_samples), 1), config.loss)
            live.of_parts = True  # while the averages go back
    return live.result()


def held_out_images(sizes: Pi0Config, cameras: Iterable[str], samples: int) -> Tensor:
    """The images of held-out samples as they wait for their measurement, as bytes."""
    side = sizes.image_size
    return torch.empty(samples, len(tuple(cameras)), side, side, 3, dtype=torch.uint8)


def example_batch(
    sizes: Pi0Config,
    cameras: Iterable[str],
    samples: int,
    draws: int,
    device: torch.device,
    *,
    prompt: int | None = None,
) -> Batch:
    """A batch of the shapes and dtypes that `Samples.finish` gives, its numbers all zero.

    Args:
        prompt: tokens, by default as many as the model takes.
    """
    side, length = sizes.image_size, prompt or sizes.require("max_token_len")
    chunk = (sizes.require("action_horizon"), sizes.action_dim)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(samples, *shape, dtype=dtype, device=device)

    observation = Observation(
        images={name: zeros(side, side, 3) for name in cameras},
        image_masks={name: zeros(dtype=torch.bool) for name in cameras},
        state=zeros(sizes.action_dim),
        tokenized_prompt=zeros(length, dtype=torch.int64),
        tokenized_prompt_mask=zeros(length, dtype=torch.bool),
    )
    is_real = zeros(*chunk, dtype=torch.bool)
    return Batch(observation, zeros(*chunk), is_real, zeros(draws, *chunk), zeros(draws), places=())


class _Moments(torch.optim.Optimizer):
    """The memory of the recipe's optimizer: its moments. The updates themselves are computed in place."""

    def __init__(self, parts: Mapping[str, nn.Parameter], kind: Kind, live: _Live) -> None:
        super().__init__(parts.values(), {})
        self.kind, self.live = kind, live
        for part in parts.values():
            self.state[part] = dict(enumerate(self._moments(part)))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing is allocated."""

    def _moments(self, part: Tensor) -> Iterator[Tensor]:
        for _ in range(2):
            if self.kind == "adamw" or part.numel() < _MIN_8BIT:
                moment = torch.empty_like(part, requires_grad=False)
                self.live.count_part(moment, "optimizer")
                yield moment
            else:
                for dtype, count in ((torch.uint8, part.numel()), (torch.float32, -(-part.numel() // _BLOCK_8BIT))):
                    moment = torch.empty(count, dtype=dtype, device=part.device)
                    self.live.count(moment, "optimizer", _bytes(moment))
                    yield moment


# bitsandbytes' AdamW8bit: moments of smaller arrays are float32; of others each block has a float32 scale.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


# ---- shards ----


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shard_bytes(tensor: Tensor, shards: int) -> int:
    """FSDP cuts along the first dimension, and pads to equal parts."""
    if shards == 1 or not tensor.ndim:
        return _bytes(tensor)
    return -(-tensor.shape[0] // shards) * (_bytes(tensor) // max(tensor.shape[0], 1))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Weights that are gathered at once."""

    modules: Sequence[nn.Module]
    """Which are run one after the other."""
    parameters: Sequence[nn.Parameter]
    dtype: torch.dtype | None
    """In which; None: each in its own."""

    def whole(self, *, trained: bool = False) -> int:
        """Bytes of the gathered weights, or of the gradients that come in their dtype."""
        kept = [p for p in self.parameters if p.requires_grad or not trained]
        return sum(p.numel() * (self.dtype or p.dtype).itemsize for p in kept)

    def reduced(self) -> int:
        """Bytes of the buffer in which its gradients are summed."""
        return sum(_bytes(p) for p in self.parameters if p.requires_grad)


def _groups(model: Pi0) -> list[_Group]:
    """Those of the layers, and last the root's."""
    groups, seen = [], set[int]()
    root: tuple[list[nn.Module], None] = ([model], None)
    for modules, dtype in (*shard_groups(model), root):
        own = [p for module in modules for p in module.parameters() if id(p) not in seen]
        seen |= set(map(id, own))
        groups.append(_Group(modules, own, dtype))
    return groups


def _follow(groups: Sequence[_Group], live: _Live) -> None:
    """Count what is whole while each group is at work. The root's weights are so all the time."""
    *inner, root = groups
    live.gathered_now(root.whole())
    for group in inner:
        if group.dtype is not None:
            live.take_for_gathered(group.parameters, group.dtype)
        _follow_group(group, root.whole(), live)


def _follow_group(group: _Group, root: int, live: _Live) -> None:
    """In the forward pass a group's weights are gathered into one buffer and copied out of it, while the buffer of the
    group before is still there. In the backward pass the next group's buffer is filled meanwhile, gradients are whole,
    and those of the group before are in the buffer that is reduced.
    """
    forward = root + 3 * group.whole()
    backward = root + 2 * group.whole() + group.whole(trained=True)

    def begins(module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # there it runs again, for its activations
            live.in_reduction = 0
            live.gathered_now(forward)

    def backward_begins(gradient: Tensor) -> None:
        live.gathered_now(backward + live.in_reduction)
        live.in_reduction = group.reduced()

    def ends(module: nn.Module, args: Any, out: Any) -> None:
        tensor = out if isinstance(out, Tensor) else out[0]
        if tensor.requires_grad:
            tensor.register_hook(backward_begins)

    group.modules[0].register_forward_pre_hook(begins)
    group.modules[-1].register_forward_hook(ends)


def _end_of_backward(peak: Memory, model: Pi0, live: _Live, root: _Group) -> Memory:
    """The root ends last: nothing but its own gradients, whole and in the buffer that is reduced, lives then."""
    return dataclasses.replace(
        peak,
        moment="update",
        gradients=sum(_shard_bytes(p, live.shards) for p in model.parameters() if p.requires_grad),
        activations=0,
        gathered=root.whole() + root.whole(trained=True) + root.reduced(),
    )


# ---- for people ----


def run_plan(config: TrainConfig, *, world_size: int | None, memory_gb: float | None, as_json: bool) -> int:
    """Print the plan of a run; the exit status, 1 if it does not fit.

    Args:
        world_size: by default the processes that torchrun has started.
        memory_gb: of each device, in 10⁹ bytes; by default what this machine has.
    """
    size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    local = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    memory = _device_memory(config, local) if memory_gb is None else int(memory_gb * 1e9)
    console = Console(stderr=True, highlight=False)
    with console.status("running it without numbers"):
        found = plan(config, world_size=size, local_world_size=local, device_memory=memory)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print_plan(found, config, Console(highlight=False))
    return 1 if found.fits is False else 0


def _device_type(config: TrainConfig) -> str:
    """Which a plan is for; CUDA need not be here."""
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _device_memory(config: TrainConfig, local_world_size: int) -> int | None:
    """What a process can have on this machine: a whole GPU, or its share of the memory that is available."""
    if _device_type(config) == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // local_world_size


def print_plan(found: Plan, config: TrainConfig, console: Console) -> None:
    """Print a plan as a table, in 10⁹ bytes."""
    processes = f"{found.world_size} process{'es' if found.world_size > 1 else ''}"
    console.print(
        f"{processes} ({config.parallel}) on {found.device}; at once {found.samples} samples × {config.num_draws} "
        f"draw{'s' if config.num_draws > 1 else ''}, {len(found.cameras)} cameras and {found.prompt_tokens} prompt "
        "tokens, the most that the model takes"
    )
    table = Table("per process, at the peak", "GB", box=None, header_style="dim")
    table.columns[1].justify = "right"
    for name in _KINDS:
        table.add_row(_NAMES[name], f"{getattr(found.peak, name) / 1e9:.2f}")
    table.add_row("together", f"{found.peak.total / 1e9:.2f}", style="bold")
    table.add_row("host: a checkpoint that is being written", f"{found.staged / 1e9:.2f}")
    if found.constant:
        table.add_row("host: constant weights, first process", f"{found.constant / 1e9:.2f}")
    console.print(table)
    what = "an update" if found.peak.moment == "update" else "a measurement on the held-out samples"
    console.print(f"The peak is in {what}. A plan, not a measurement; docs/memory.md says what is not counted.")
    _print_verdict(found, console)


def _print_verdict(found: Plan, console: Console) -> None:
    if found.device_memory is None:
        console.print(f"Whether it fits is not known: no {found.device} memory is known here; --plan-memory GB says it")
        return
    of = f"{found.needed / 1e9:.2f} of {found.device_memory / 1e9:.2f} GB, of which {USABLE:.0%} can be planned with"
    console.print(f"{'fits' if found.fits else 'DOES NOT FIT'}: {of}")
    for other in found.alternatives:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in other.fields.items())
        console.print(f"  {'fits' if other.fits else 'does not fit'}, {other.total / 1e9:.2f} GB: {options}")


_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "moving average",
    "data": "batches, held-out ones included",
    "activations": "activations",
    "gathered": "gathered layers",
}
