"""Estimated peak memory of a run: its own code on tensors without data, and every storage counted while it lives.

The layers of a stack are alike, so two runs with few of them show what each further one adds. Where several processes
share a model, the size of their shards follows from the shapes.
"""

import contextlib
import dataclasses
import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpi.config import Pi0Config
from torchpi.model.pi0 import Pi0
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.config import Optimizer, TrainConfig
from torchpi.training.distributed import shard_groups, single_process
from torchpi.training.hooks import FLOW_SAMPLES
from torchpi.training.loop import update
from torchpi.training.samples import Batch, example_batch, loss_sum
from torchpi.training.state import TrainState
from torchpi.training.weights import with_depth

KINDS = ("weights", "gradients", "optimizer", "ema", "data", "activations", "gathered")
Moment = Literal["update", "evaluation"]
Bytes = Mapping[tuple[str, str], int]
"""By kind, and by the stacks with whose depth they grow: "vision" or "gemma"."""
_LAYERS = {"vision": 2, "gemma": 3}
"""Layers of the first run: the first one may differ from those behind it, and so does the backbone's last one."""


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
    model: Pi0,
    build: Callable[[Pi0Config], Pi0],
    config: TrainConfig,
    cameras: Sequence[str],
    *,
    world_size: int,
    shards: int,
    device: str,
) -> PeakMemory:
    """The peak of a run in one process, without what is always there: the optimizer's moments and the EMA weights.

    Args:
        model: on "meta", as `build_model` makes it.
        build: makes that of other sizes.
        shards: processes that share what belongs to a weight.
        device: "cpu" or "cuda", which need not exist here.
    """
    is_ddp = config.parallel.strategy == "ddp"

    def peaks_of(sizes: Pi0Config) -> dict[tuple[Moment, str], Bytes]:
        shallow, live = build(sizes), _LiveTensors(shards, buckets=is_ddp and world_size > 1)
        with without_data(), live:
            for group in [] if is_ddp else _gathered_groups(shallow)[:-1]:
                live.ignore_casts(group)
            _run(shallow, config, cameras, world_size, live, on_cpu=device == "cpu")
        return live.peaks

    depths = {"vision": model.config.siglip.depth, "gemma": model.config.paligemma.depth}
    least, one_more = (
        peaks_of(with_depth(model.config, **{stacks: layers + more for stacks, layers in _LAYERS.items()}))
        for more in (0, 1)
    )
    left = {stacks: max(0, depths[stacks] - layers) for stacks, layers in _LAYERS.items()}
    peaks = [
        PeakMemory(moment, **_deeper(found, one_more[moment, part], left)) for (moment, part), found in least.items()
    ]
    if not is_ddp:
        *layers, root = _gathered_groups(model)
        peaks = [dataclasses.replace(peak, gathered=_gathered_bytes(layers, root, peak.moment)) for peak in peaks]
        # The root ends last: nothing but its own gradients, whole and in the buffer that is reduced, lives then.
        gradients = sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad)
        gathered = root.weights + root.gradients + root.reduced
        peaks.append(dataclasses.replace(peaks[0], gradients=gradients, activations=0, gathered=gathered))
    return max(peaks, key=lambda peak: peak.total)


def _deeper(least: Bytes, one_more: Bytes, left: Mapping[str, int]) -> dict[str, int]:
    """Bytes by kind with all layers, each of which adds what one more did."""
    found = dict.fromkeys(KINDS, 0)
    for kind, stacks in {*least, *one_more}:
        before = least.get((kind, stacks), 0)
        found[kind] += before + left[stacks] * (one_more.get((kind, stacks), 0) - before)
    return found


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
    """Bytes of the tensors that live, and their values at the peak of each part of each moment.

    The parts are the stacks' layers, forward and backward, and what is between them. In the layers memory grows or
    shrinks by the same bytes from one to the next, so that each part's peak is linear in the number of layers.

    With `buckets`, gradients are in buckets that stay, as DistributedDataParallel has them.
    """

    _made: ClassVar[dict[Any, tuple[Any, Any, torch.dtype] | None]] = {}
    """Sizes, strides and dtype of an operation's new tensor, by what it gets: PyTorch finds them in Python, slowly."""

    def __init__(self, shards: int, *, buckets: bool) -> None:
        super().__init__()
        self.shards, self.buckets = shards, buckets
        self.moment: Moment | None = None
        self.part = "between"
        self.now, self.total = Counter[tuple[str, str]](), 0
        self.peaks, self._most = dict[tuple[Moment, str], Bytes](), dict[tuple[Moment, str], int]()
        self._known: dict[int, tuple[weakref.ref[Any], tuple[str, str], int]] = {}
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
        self.moment, self.part = moment, "between"
        self.add(("data", "gemma"), 0)

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

    def count(self, tensor: Tensor, kind: str, nbytes: int | None = None, *, owner: str | None = None) -> None:
        """Count a tensor's storage, by default its shard's bytes, for as long as it lives. It belongs to the `owner`, a
        parameter's name, or to the part that is at work."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        nbytes = shard_bytes(tensor, self.shards) if nbytes is None else nbytes
        counted = kind, "vision" if (owner or self.part).startswith("vision") else "gemma"
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), counted, nbytes
        self.add(counted, nbytes)

    def add(self, counted: tuple[str, str], nbytes: int) -> None:
        """Count bytes that no tensor of this model holds."""
        self.now[counted] += nbytes
        self.total += nbytes
        if self.moment is not None and self.total > self._most.get((self.moment, self.part), -1):
            place = self.moment, self.part
            self._most[place], self.peaks[place] = self.total, dict(self.now)

    def _forget(self, key: int) -> None:
        if key in self._known:
            _, counted, nbytes = self._known.pop(key)
            self.now[counted] -= nbytes
            self.total -= nbytes

    def count_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Count gradients as such from the moment at which they are made."""

        def made(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            # 0: added to what is in the bucket
            self.count(parameter.grad, "gradients", 0 if self.buckets else None, owner=name)

        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(made, name))
            if self.buckets:
                self.add(("gradients", "vision" if name.startswith("vision") else "gemma"), parameter.nbytes)

    def follow(self, model: Pi0) -> None:
        """Take note of the part that is at work."""

        def enter(part: str, *_: Any) -> None:
            self.part = part

        def before(stack: str, is_first: bool, layer: nn.Module, args: Any) -> None:
            enter(f"{stack} forward")
            if is_first and args[0].requires_grad:
                args[0].register_hook(functools.partial(enter, f"behind the backward pass of {stack}"))

        def after(stack: str, layer: nn.Module, args: Any, out: Any) -> None:
            enter(f"behind {stack}")
            x = out if isinstance(out, Tensor) else out[0]
            if x.requires_grad:
                x.register_hook(functools.partial(enter, f"{stack} backward"))

        backbone = list(model.backbone.layers)[:-1]
        for stack, blocks in (("vision", model.vision.blocks), ("backbone", backbone), ("expert", model.expert.layers)):
            for number, layer in enumerate(blocks):
                layer.register_forward_pre_hook(functools.partial(before, stack, number == 0))
                layer.register_forward_hook(functools.partial(after, stack))


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
    live.follow(model)
    parallel = single_process(model)
    state = TrainState.create(model, weight_decay=optim.weight_decay, ema=False)
    state.optimizer = torch.optim.SGD(state.local_shards.values(), lr=0.0)  # in place, as AdamW, without its moments
    for name, parameter in model.named_parameters():
        live.count(parameter, "weights", owner=name)
    live.count_gradients(state.trainable)
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
