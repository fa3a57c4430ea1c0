"""What lives during an update and a measurement of a recipe, byte by byte, without allocating it.

The run's own code is run on tensors without numbers, and every storage is counted from the operation that makes it
until the last reference to it is gone. Where several processes share a model, its parts follow from the shapes.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpi.config import Pi0Config
from torchpi.model.pi0 import Pi0
from torchpi.training.config import Optimizer, TrainConfig
from torchpi.training.distributed import alone, shard_groups
from torchpi.training.holdout import DRAWS as HOLDOUT_DRAWS
from torchpi.training.loop import update
from torchpi.training.memory import checkpoint_activations
from torchpi.training.samples import Batch, loss_sum
from torchpi.training.state import TrainState
from torchpi.types import Observation

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
        return sum(getattr(self, name) for name in KINDS)


KINDS = ("weights", "gradients", "optimizer", "ema", "data", "activations", "gathered")
"""What `Memory` tells apart."""


def peak_memory(
    model: Pi0,
    config: TrainConfig,
    sizes: Pi0Config,
    cameras: tuple[str, ...],
    *,
    world_size: int,
    shards: int,
    device: str,
) -> Memory:
    """The moment of a run at which most lives in one process.

    Args:
        model: on "meta", prepared as `begin_model` does; it is used up.
        shards: processes that share what belongs to a weight.
        device: "cpu" or "cuda", which need not be here.
    """
    live = _Live(shards, gradients_always=config.parallel.strategy == "ddp" and world_size > 1)
    groups = [] if config.parallel.strategy == "ddp" else _groups(model)
    with _without_numbers(device) as stand_in, live:
        peak = _run(model, config, sizes, cameras, world_size, live, torch.device(stand_in), groups)
    return max(peak, _end_of_backward(peak, model, live, groups[-1]), key=lambda m: m.total) if groups else peak


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
        self.now = dict.fromkeys(KINDS, 0)
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
                self.count(tensor, "activations", shard_bytes(tensor, self.shards) if self.of_parts else nbytes)
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
        self.count(tensor, kind, shard_bytes(tensor, self.shards))

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
                self.now["gradients"] += num_bytes(parameter)

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
    config = config.replace(loss="all")  # how many terms are real is a number
    model.to_empty(device=device)
    checkpoint_activations(model, config.model.activation_checkpointing)
    parallel = alone(model)
    state = TrainState.begin(model, weight_decay=config.optim.weight_decay, ema=config.optim.ema_decay > 0)
    state.optimizer = _Moments(state.parts, config.optim.optimizer, live)
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
            live.count(tensor, "data", num_bytes(tensor))
        return made

    samples = config.batch_size // (world_size * config.grad_accum_steps)
    if config.eval.holdout and device.type == "cpu":  # elsewhere they wait in the host's memory
        passes = math.ceil(config.eval.holdout_samples / (samples * world_size))
        waiting = held_out_images(sizes, cameras, passes * samples)
        live.count(waiting, "data", num_bytes(waiting))
    batches = [batch(samples, config.optim.flow_samples_per_obs) for _ in range(config.grad_accum_steps)]
    update(state, config, batches[:2], parallel)  # all passes behind the first one find its gradients
    live.moment = "measurement"
    if config.eval.holdout:
        with contextlib.ExitStack() as stack, torch.no_grad():
            live.of_parts = True
            stack.enter_context(state.averaged_weights())
            live.of_parts = False
            loss_sum(parallel.forward, batch(samples, HOLDOUT_DRAWS), config.optim.loss)
            if config.eval.chunk_samples:  # sampling: the same passes, without several draws
                loss_sum(parallel.forward, batch(min(samples, config.eval.chunk_samples), 1), config.optim.loss)
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

    def __init__(self, parts: Mapping[str, nn.Parameter], kind: Optimizer, live: _Live) -> None:
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
                    self.live.count(moment, "optimizer", num_bytes(moment))
                    yield moment


# bitsandbytes' AdamW8bit: moments of smaller arrays are float32; of others each block has a float32 scale.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


# ---- shards ----


def num_bytes(tensor: Tensor) -> int:
    """Of its numbers."""
    return tensor.numel() * tensor.element_size()


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Of a process' part: FSDP cuts along the first dimension, and pads to equal parts."""
    if shards == 1 or not tensor.ndim:
        return num_bytes(tensor)
    return -(-tensor.shape[0] // shards) * (num_bytes(tensor) // max(tensor.shape[0], 1))


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
        return sum(num_bytes(p) for p in self.parameters if p.requires_grad)


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
        gradients=sum(shard_bytes(p, live.shards) for p in model.parameters() if p.requires_grad),
        activations=0,
        gathered=root.whole() + root.whole(trained=True) + root.reduced(),
    )
