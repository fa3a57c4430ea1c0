"""Estimated peak memory of a run: its own code on tensors without data, and every storage counted while it lives.

Where several processes share a model, the size of their shards follows from the shapes.
"""

import contextlib
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpi.model.pi0 import Pi0
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.config import Optimizer, TrainConfig
from torchpi.training.distributed import shard_groups, single_process
from torchpi.training.hooks import FLOW_SAMPLES
from torchpi.training.loop import update
from torchpi.training.samples import Batch, example_batch, loss_sum
from torchpi.training.state import TrainState

KINDS = ("weights", "gradients", "optimizer", "ema", "data", "activations", "gathered")
Moment = Literal["update", "evaluation"]


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes of a process on its device at the peak."""

    moment: Moment
    weights: int
    gradients: int
    """Those that exist at the peak; at the end of an update's first forward pass there are none."""
    optimizer: int
    ema: int
    data: int
    """The batches of an update, and the held-out samples."""
    activations: int
    """The rest: tensors for the backward pass, copies of weights in the dtype of the matmuls included."""
    gathered: int
    """Whole weights and gradients of the layers at work, where the model is sharded."""

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(getattr(self, name) for name in KINDS)


def peak_memory(
    model: Pi0, config: TrainConfig, cameras: Sequence[str], *, world_size: int, shards: int, device: str
) -> PeakMemory:
    """The peak of a run in one process, without what is always there: the optimizer's moments and the EMA weights.

    Args:
        model: on "meta", as `build_model` makes it; it is used up.
        shards: processes that share what belongs to a weight.
        device: "cpu" or "cuda", which need not exist here.
    """
    is_ddp = config.parallel.strategy == "ddp"
    *layers, root = _gathered_groups(model)
    live = _LiveTensors(shards, buckets=is_ddp and world_size > 1)
    with without_data(), live:
        for group in [] if is_ddp else layers:
            live.ignore_casts(group)
        _run(model, config, cameras, world_size, live, on_cpu=device == "cpu")
    peaks = [PeakMemory(moment, **dict.fromkeys(KINDS, 0) | found) for moment, (_, found) in live.peaks.items()]
    if not is_ddp:
        peaks = [dataclasses.replace(peak, gathered=_gathered_bytes(layers, root, peak.moment)) for peak in peaks]
        # The root ends last: nothing but its own gradients, whole and in the buffer that is reduced, lives then.
        gradients = sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
        gathered = root.weights + root.gradients + root.reduced
        peaks.append(dataclasses.replace(peaks[0], gradients=gradients, activations=0, gathered=gathered))
    return max(peaks, key=lambda peak: peak.total)


class _Group:
    """Bytes of the weights that FSDP gathers at once."""

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None) -> None:
        self.parameters, self.dtype = parameters, dtype
        sizes = [(p.numel() * (dtype or p.dtype).itemsize, p) for p in parameters]
        self.weights = sum(nbytes for nbytes, _ in sizes)
        self.gradients = sum(nbytes for nbytes, p in sizes if p.requires_grad)
        self.reduced = sum(p.nbytes for p in parameters if p.requires_grad)
        """The buffer in which its gradients are summed."""


def _gathered_groups(model: Pi0) -> list[_Group]:
    """Those of the layers, and last the root's."""
    groups, seen = [], set[nn.Parameter]()
    root: tuple[list[nn.Module], None] = ([model], None)
    for modules, dtype in (*shard_groups(model), root):
        own = [p for module in modules for p in module.parameters() if p not in seen]
        seen.update(own)
        groups.append(_Group(own, dtype))
    return groups


def _gathered_bytes(layers: Sequence[_Group], root: _Group, moment: Moment) -> int:
    """Bytes of gathered weights and gradients while the largest layers are at work. The root's are there always.

    In the forward pass a group's weights are gathered into one buffer and copied out of it, while the buffer of the
    group before is still there. In the backward pass the next group's buffer is filled meanwhile, gradients are whole,
    and those of the group before are in the buffer that is reduced.
    """
    forward = max(3 * layer.weights for layer in layers)
    if moment == "evaluation":
        return root.weights + forward
    backward = max(2 * layer.weights + layer.gradients for layer in layers)
    return root.weights + max(forward, backward + max(layer.reduced for layer in layers))


class _LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that live, by kind, and at the peak of each moment.

    With `buckets`, gradients are in buckets that stay, as DistributedDataParallel has them.
    """

    _made: ClassVar[dict[Any, tuple[Any, Any, torch.dtype] | None]] = {}
    """Sizes, strides and dtype of an operation's new tensor, by what it gets: PyTorch finds them in Python, slowly."""

    def __init__(self, shards: int, *, buckets: bool) -> None:
        super().__init__()
        self.shards, self.buckets = shards, buckets
        self.moment: Moment | None = None
        self.now = Counter[str]()
        self.peaks: dict[Moment, tuple[int, dict[str, int]]] = {}
        """The sum, and the bytes by kind."""
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._ignored_casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # there is no number: a norm that is clipped, a loss that is finite
        out = self._result(func, args, kwargs or {})
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self.count(tensor, "activations", 0 if self._is_ignored(func, args, tensor) else storage.nbytes())
        return out

    def start(self, moment: Moment) -> None:
        """Take note of peaks, as those of a moment."""
        self.moment, self.peaks[moment] = moment, (0, {})
        self.add("data", 0)

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, _signature((*args, *kwargs.items()))
        if (made := self._made.get(key)) is not None:
            sizes, strides, dtype = made
            return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if key not in self._made:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            is_new = isinstance(out, Tensor) and out.is_meta and out.untyped_storage()._cdata not in given
            self._made[key] = (out.shape, out.stride(), out.dtype) if is_new else None
        return out

    def _is_ignored(self, func: Any, args: Any, made: Tensor) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        return self._ignored_casts.get(args[0].untyped_storage()._cdata) is made.dtype

    def ignore_casts(self, group: _Group) -> None:
        """Take copies of these weights in the group's dtype for gathered ones, which are not kept."""
        if group.dtype is not None:
            self._ignored_casts |= {p.untyped_storage()._cdata: group.dtype for p in group.parameters}

    def count(self, tensor: Tensor, kind: str, nbytes: int | None = None) -> None:
        """Count a tensor's storage, by default its shard's bytes, for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        nbytes = shard_bytes(tensor, self.shards) if nbytes is None else nbytes
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, nbytes
        self.add(kind, nbytes)

    def add(self, kind: str, nbytes: int) -> None:
        """Count bytes that no tensor of this model holds."""
        self.now[kind] += nbytes
        if self.moment is not None and (total := self.now.total()) > self.peaks[self.moment][0]:
            self.peaks[self.moment] = total, dict(self.now)

    def _forget(self, key: int) -> None:
        if key in self._known:
            _, kind, nbytes = self._known.pop(key)
            self.now[kind] -= nbytes

    def count_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count gradients as such from the moment at which they are made."""

        def made(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.count(parameter.grad, "gradients", 0 if self.buckets else None)  # 0: added to what is in the bucket

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(made)
            if self.buckets:
                self.add("gradients", parameter.nbytes)


def _signature(value: Any) -> Any:
    """All of an operation's argument that its result's sizes and dtype can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_signature, value)) if isinstance(value, list | tuple) else (type(value), value)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """On "meta", attention as fused kernels have it, on CUDA and on the CPU, whose backward pass needs the output and a
    number per row; PyTorch writes its products out there."""
    # Not tensors that pretend to be on a device: they are slow, and without CUDA autograd can't run those on it.
    # A mode that replaces the operation would be off in the backward pass, which runs layers again.
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
        yield


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = attention(q, k, v, bias, torch.is_grad_enabled())[0]
    return out


def _run(
    model: Pi0, config: TrainConfig, cameras: Sequence[str], world_size: int, live: _LiveTensors, *, on_cpu: bool
) -> None:
    """An update and an evaluation, without what is always there: the optimizer's moments and the EMA weights."""
    sizes, optim, evaluation, device = model.config, config.optim, config.eval, torch.device("meta")
    config = config.replace(loss="all")  # the number of real elements is data
    checkpoint_activations(model, config.model.activation_checkpointing)
    parallel = single_process(model)
    state = TrainState.create(model, weight_decay=optim.weight_decay, ema=False)
    state.optimizer = torch.optim.SGD(state.trainable.values(), lr=0.0)  # in place, as AdamW, without its moments
    for parameter in model.parameters():
        live.count(parameter, "weights")
    live.count_gradients(state.trainable.values())
    live.start("update")

    def batch(samples: int, flow_samples: int) -> Batch:
        made = example_batch(sizes, cameras, samples, flow_samples, device)
        for tensor in made.to_tensors().values():
            live.count(tensor, "data", tensor.nbytes)
        return made

    samples = config.micro_batch_size(world_size)
    if evaluation.holdout and on_cpu:  # elsewhere they wait in the host's memory
        rounds = math.ceil(evaluation.holdout_samples / (samples * world_size))
        shape = (rounds * samples, len(cameras), sizes.image_size, sizes.image_size, 3)
        waiting = torch.empty(shape, dtype=torch.uint8, device=device)
        live.count(waiting, "data", waiting.nbytes)
    batches = [batch(samples, optim.flow_samples_per_obs) for _ in range(config.grad_accum_steps)]
    update(state, config, batches[:2], parallel)  # all micro-batches after the first one find its gradients
    if evaluation.holdout:
        live.start("evaluation")
        with torch.no_grad():
            loss_sum(parallel.forward, batch(samples, FLOW_SAMPLES), "all")  # sampling takes less: one noise each


# bitsandbytes' AdamW8bit: moments of smaller arrays are float32; of others each block has a float32 scale.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


def moment_bytes(shard: Tensor, kind: Optimizer, shards: int) -> int:
    """Bytes of the optimizer's two moments of a parameter."""
    if kind == "adamw" or shard.numel() < _MIN_8BIT:
        return 2 * shard_bytes(shard, shards)
    return 2 * (shard.numel() + 4 * math.ceil(shard.numel() / _BLOCK_8BIT))


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Bytes of a process' shard: FSDP cuts along the first dimension, and pads to equal shards."""
    if shards == 1 or not tensor.ndim:
        return tensor.nbytes
    return -(-tensor.shape[0] // shards) * (tensor.nbytes // max(tensor.shape[0], 1))
