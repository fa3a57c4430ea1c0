"""Estimated peak memory of a run: the training code runs on "meta" tensors, and every live storage is counted.

If several processes share a model, the sizes of their shards are computed from the shapes.
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
Phase = Literal["update", "evaluation"]


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Device memory of a process at the peak, in bytes."""

    moment: Phase
    """Phase of the run at the peak."""
    weights: int
    gradients: int
    """Gradients that exist at the peak; there are none at the end of an update's first forward pass."""
    optimizer: int
    ema: int
    data: int
    """The batches of an update, and the held-out samples."""
    activations: int
    """All other tensors: those kept for the backward pass, and copies of weights in the dtype of the matmuls."""
    gathered: int
    """Unsharded weights and gradients of the layers being computed, if the model is sharded."""

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(getattr(self, name) for name in KINDS)


def peak_memory(
    model: Pi0, config: TrainConfig, cameras: Sequence[str], *, world_size: int, shards: int, device: str
) -> PeakMemory:
    """Peak memory of one process of a run, without the optimizer's moments and the EMA weights.

    Args:
        model: a model of `build_model` on "meta"; it can't be used afterwards.
        shards: number of processes that share each weight.
        device: "cpu" or "cuda"; the device need not exist on this machine.
    """
    is_ddp = config.parallel.strategy == "ddp"
    *layers, root = _gathered_groups(model)
    live = _LiveTensors(shards, buckets=is_ddp and world_size > 1)
    with without_data(), live:
        for group in [] if is_ddp else layers:
            live.ignore_casts(group)
        _run(model, config, cameras, world_size, live, on_cpu=device == "cpu")
    peaks = [PeakMemory(phase, **dict.fromkeys(KINDS, 0) | kinds) for phase, (_, kinds) in live.peaks.items()]
    if not is_ddp:
        peaks = [dataclasses.replace(peak, gathered=_gathered_bytes(layers, root, peak.moment)) for peak in peaks]
        # The root's backward pass ends last. Its gradients exist twice then, unsharded and in the reduction buffer.
        gradients = sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
        gathered = root.weights + root.gradients + root.reduced
        peaks.append(dataclasses.replace(peaks[0], gradients=gradients, activations=0, gathered=gathered))
    return max(peaks, key=lambda peak: peak.total)


class _Group:
    """Weights that FSDP gathers together, and their sizes in bytes."""

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None) -> None:
        self.parameters, self.dtype = parameters, dtype
        sizes = [(p.numel() * (dtype or p.dtype).itemsize, p) for p in parameters]
        self.weights = sum(nbytes for nbytes, _ in sizes)
        self.gradients = sum(nbytes for nbytes, p in sizes if p.requires_grad)
        self.reduced = sum(p.nbytes for p in parameters if p.requires_grad)
        """Size of the buffer in which the gradients are reduced."""


def _gathered_groups(model: Pi0) -> list[_Group]:
    """The groups of the layers, and the root's group at the end."""
    groups, seen = [], set[nn.Parameter]()
    root: tuple[list[nn.Module], None] = ([model], None)
    for modules, dtype in (*shard_groups(model), root):
        own = [p for module in modules for p in module.parameters() if p not in seen]
        seen.update(own)
        groups.append(_Group(own, dtype))
    return groups


def _gathered_bytes(layers: Sequence[_Group], root: _Group, phase: Phase) -> int:
    """Bytes of gathered weights and gradients while the largest layers are computed; the root's weights stay gathered.

    In the forward pass a group's weights are gathered into a buffer and copied out of it, while the buffer of the
    previous group still exists. In the backward pass the buffer of the next group is being filled, the gradients are
    unsharded, and the gradients of the previous group are in the reduction buffer.
    """
    forward = max(3 * layer.weights for layer in layers)
    if phase == "evaluation":
        return root.weights + forward
    backward = max(2 * layer.weights + layer.gradients for layer in layers)
    return root.weights + max(forward, backward + max(layer.reduced for layer in layers))


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors by kind, and records the peak of each phase of a run.

    With `buckets`, gradients live in permanent buckets, like those of DistributedDataParallel.
    """

    _results: ClassVar[dict[Any, tuple[Any, Any, torch.dtype] | None]] = {}
    """Cache of an operation's result (sizes, strides, dtype) by its arguments: inferring it in PyTorch is slow."""

    def __init__(self, shards: int, *, buckets: bool) -> None:
        super().__init__()
        self.shards, self.buckets = shards, buckets
        self.phase: Phase | None = None
        self.now = Counter[str]()
        self.peaks: dict[Phase, tuple[int, dict[str, int]]] = {}
        """Total bytes, and bytes by kind."""
        self._counted: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._ignored_casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # "meta" tensors have no values; this stands for a finite loss or norm
        out = self._result(func, args, kwargs or {})
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._counted:
                nbytes = 0 if self._is_ignored(func, args, tensor) else tensor.untyped_storage().nbytes()
                self.count(tensor, "activations", nbytes)
        return out

    def start(self, phase: Phase) -> None:
        """Record the following peaks under this phase."""
        self.phase, self.peaks[phase] = phase, (0, {})
        self.add("data", 0)

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, _signature((*args, *kwargs.items()))
        if (result := self._results.get(key)) is not None:
            sizes, strides, dtype = result
            return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if key not in self._results:
            inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            is_new = isinstance(out, Tensor) and out.is_meta and out.untyped_storage()._cdata not in inputs
            self._results[key] = (out.shape, out.stride(), out.dtype) if is_new else None
        return out

    def _is_ignored(self, func: Any, args: Any, out: Tensor) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        return self._ignored_casts.get(args[0].untyped_storage()._cdata) is out.dtype

    def ignore_casts(self, group: _Group) -> None:
        """Don't count copies of these weights in the group's dtype: FSDP gathers them in that dtype and frees them."""
        if group.dtype is not None:
            self._ignored_casts |= {p.untyped_storage()._cdata: group.dtype for p in group.parameters}

    def count(self, tensor: Tensor, kind: str, nbytes: int | None = None) -> None:
        """Count a tensor's storage while it is alive; by default the bytes of this process's shard."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        nbytes = shard_bytes(tensor, self.shards) if nbytes is None else nbytes
        self._counted[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, nbytes
        self.add(kind, nbytes)

    def add(self, kind: str, nbytes: int) -> None:
        """Add bytes to the current total and update the peak."""
        self.now[kind] += nbytes
        if self.phase is not None and (total := self.now.total()) > self.peaks[self.phase][0]:
            self.peaks[self.phase] = total, dict(self.now)

    def _forget(self, key: int) -> None:
        if key in self._counted:
            _, kind, nbytes = self._counted.pop(key)
            self.now[kind] -= nbytes

    def count_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count gradients under their own kind from the time they are accumulated."""

        def count(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.count(parameter.grad, "gradients", 0 if self.buckets else None)  # buckets are counted below

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)
            if self.buckets:
                self.add("gradients", parameter.nbytes)


def _signature(value: Any) -> Any:
    """The parts of an argument that determine the sizes and dtype of an operation's result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_signature, value)) if isinstance(value, list | tuple) else (type(value), value)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Let attention on "meta" tensors take the memory of the fused kernels on CUDA and CPU.

    Their backward pass needs only the output and one number per row; on "meta" PyTorch keeps the attention matrix.
    """
    # FakeTensors would be slow, and autograd can't run those on CUDA without a GPU. A dispatch mode that replaces the
    # operation would be inactive when the backward pass recomputes layers.
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
    """Run an update and an evaluation, without the optimizer's moments and the EMA weights."""
    sizes, optim, evaluation, device = model.config, config.optim, config.eval, torch.device("meta")
    config = config.replace(loss="all")  # counting the real elements would need data
    checkpoint_activations(model, config.model.activation_checkpointing)
    parallel = single_process(model)
    state = TrainState.create(model, weight_decay=optim.weight_decay, ema=False)
    state.optimizer = torch.optim.SGD(state.trainable.values(), lr=0.0)  # in place like AdamW, but without moments
    for parameter in model.parameters():
        live.count(parameter, "weights")
    live.count_gradients(state.trainable.values())
    live.start("update")

    def make_batch(samples: int, flow_samples: int) -> Batch:
        batch = example_batch(sizes, cameras, samples, flow_samples, device)
        for tensor in batch.to_tensors().values():
            live.count(tensor, "data", tensor.nbytes)
        return batch

    samples = config.micro_batch_size(world_size)
    if evaluation.holdout and on_cpu:  # with CUDA the held-out samples stay in the host's memory
        rounds = math.ceil(evaluation.holdout_samples / (samples * world_size))
        shape = (rounds * samples, len(cameras), sizes.image_size, sizes.image_size, 3)
        held_out = torch.empty(shape, dtype=torch.uint8, device=device)
        live.count(held_out, "data", held_out.nbytes)
    batches = [make_batch(samples, optim.flow_samples_per_obs) for _ in range(config.grad_accum_steps)]
    update(state, config, batches[:2], parallel)  # two suffice: from the second one on, gradients exist already
    if evaluation.holdout:
        live.start("evaluation")
        with torch.no_grad():
            loss_sum(parallel.forward, make_batch(samples, FLOW_SAMPLES), "all")  # sampling chunks needs less memory


# bitsandbytes' AdamW8bit keeps float32 moments for smaller arrays, and a float32 scale per block for larger ones.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


def moment_bytes(shard: Tensor, kind: Optimizer, shards: int) -> int:
    """Bytes of the optimizer's two moments for a parameter."""
    if kind == "adamw" or shard.numel() < _MIN_8BIT:
        return 2 * shard_bytes(shard, shards)
    return 2 * (shard.numel() + 4 * math.ceil(shard.numel() / _BLOCK_8BIT))


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Bytes of a process's shard: FSDP splits the first dimension and pads to equal shards."""
    if shards == 1 or not tensor.ndim:
        return tensor.nbytes
    return -(-tensor.shape[0] // shards) * (tensor.nbytes // max(tensor.shape[0], 1))
