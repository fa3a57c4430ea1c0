"""Estimated peak memory of a run: its own code on tensors without data, and every storage counted while it lives.

Where several processes share a model, the size of their shards follows from the shapes.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
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
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.config import Optimizer, TrainConfig
from torchpi.training.distributed import shard_groups, single_process
from torchpi.training.holdout import FLOW_SAMPLES
from torchpi.training.loop import update
from torchpi.training.samples import Batch, loss_sum
from torchpi.training.state import TrainState
from torchpi.types import Observation

KINDS = ("weights", "gradients", "optimizer", "ema", "data", "activations", "gathered")


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes of a process on its device at the peak."""

    moment: Literal["update", "evaluation"]
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
    """The peak of a run in one process.

    Args:
        model: on "meta", as `build_model` makes it; it is used up.
        shards: processes that share what belongs to a weight.
        device: "cpu" or "cuda", which need not exist here.
    """
    is_ddp = config.parallel.strategy == "ddp"
    live = _LiveTensors(shards, buckets=is_ddp and world_size > 1)
    groups = [] if is_ddp else _gathered_groups(model)
    with _without_data(device) as stand_in, live:
        _run(model, config, cameras, world_size, live, torch.device(stand_in), groups)
    moment, kinds = live.peak
    peak = PeakMemory(moment, **kinds)
    if not groups:
        return peak
    # The root ends last: nothing but its own gradients, whole and in the buffer that is reduced, lives then.
    root = groups[-1]
    end_of_backward = dataclasses.replace(
        peak,
        moment="update",
        gradients=sum(shard_bytes(p, shards) for p in model.parameters() if p.requires_grad),
        activations=0,
        gathered=root.gathered() + root.gathered(trainable=True) + root.reduced(),
    )
    return max(peak, end_of_backward, key=lambda memory: memory.total)


class _LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that live, by kind, and their values at the peak.

    With `buckets`, gradients are in buckets that stay, as DistributedDataParallel has them. While `in_shards` is set,
    the tensors that are made belong to shards.
    """

    def __init__(self, shards: int, *, buckets: bool) -> None:
        super().__init__()
        self.shards, self.buckets, self.in_shards = shards, buckets, False
        self.moment: Any = "update"
        self.now = dict.fromkeys(KINDS, 0)
        self.peak: tuple[Any, dict[str, int]] = (self.moment, dict(self.now))
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._gathered_dtypes: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # there is no number: a norm that is clipped, a loss that is finite
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                nbytes = 0 if self._is_gathered(func, args, tensor) else tensor.untyped_storage().nbytes()
                self.count(tensor, "activations", shard_bytes(tensor, self.shards) if self.in_shards else nbytes)
        return out

    def _is_gathered(self, func: Any, args: Any, made: Tensor) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        return self._gathered_dtypes.get(args[0].untyped_storage()._cdata) is made.dtype

    def gather_in(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Take copies of these weights in this dtype for gathered ones, which are not kept."""
        for parameter in parameters:
            self._gathered_dtypes[parameter.untyped_storage()._cdata] = dtype

    def set_gathered(self, nbytes: int) -> None:
        self.now["gathered"] = nbytes
        self._note_peak()

    def count(self, tensor: Tensor, kind: str, nbytes: int | None = None) -> None:
        """Count a tensor's storage, by default its shard's bytes, for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._forget(key)
        nbytes = shard_bytes(tensor, self.shards) if nbytes is None else nbytes
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, nbytes
        self.now[kind] += nbytes
        self._note_peak()

    def _forget(self, key: int) -> None:
        if key in self._known:
            _, kind, nbytes = self._known.pop(key)
            self.now[kind] -= nbytes

    def _note_peak(self) -> None:
        if sum(self.now.values()) > sum(self.peak[1].values()):
            self.peak = self.moment, dict(self.now)

    def count_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count gradients as such from the moment at which they are made."""

        def made(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.count(parameter.grad, "gradients", 0 if self.buckets else None)  # 0: added to what is in the bucket

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(made)
            if self.buckets:
                self.now["gradients"] += num_bytes(parameter)


@contextlib.contextmanager
def _without_data(device: str) -> Iterator[str]:
    """Tensors with shapes alone; yields the device on which to make them."""
    if device == "cpu":
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield "cpu"
    else:
        # Not tensors that pretend to be on CUDA: where it is missing, autograd can't run them. On "meta" PyTorch
        # computes attention's matmuls one by one; a mode that replaces it would be off in the backward pass, which
        # runs layers again.
        with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
            yield "meta"


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Attention as CUDA's fused kernels have it, whose backward pass needs the output and a number per row."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = attention(q, k, v, bias, torch.is_grad_enabled())[0]
    return out


def _run(
    model: Pi0,
    config: TrainConfig,
    cameras: Sequence[str],
    world_size: int,
    live: _LiveTensors,
    device: torch.device,
    groups: Sequence["_Group"],
) -> None:
    """An update, which finds the moments as those after the first one do, and an evaluation."""
    sizes, optim, evaluation = model.config, config.optim, config.eval
    config = config.replace(loss="all")  # the number of real elements is data
    model.to_empty(device=device)
    checkpoint_activations(model, config.model.activation_checkpointing)
    parallel = single_process(model)
    state = TrainState.create(model, weight_decay=optim.weight_decay, ema=optim.ema_decay > 0)
    state.optimizer = _Moments(list(state.local_shards.values()), optim.optimizer, live)
    for parameter in model.parameters():
        live.count(parameter, "weights")
    _follow(groups, live)
    for average in state.ema.values():
        live.count(average, "ema")
    live.count_gradients(state.trainable.values())
    live.peak = live.moment, dict(live.now)

    def batch(samples: int, flow_samples: int) -> Batch:
        made = example_batch(sizes, cameras, samples, flow_samples, device)
        for tensor in made.to_tensors().values():
            live.count(tensor, "data", num_bytes(tensor))
        return made

    samples = config.batch_size // (world_size * config.grad_accum_steps)
    if evaluation.holdout and device.type == "cpu":  # elsewhere they wait in the host's memory
        rounds = math.ceil(evaluation.holdout_samples / (samples * world_size))
        waiting = held_out_images(sizes, cameras, rounds * samples)
        live.count(waiting, "data", num_bytes(waiting))
    batches = [batch(samples, optim.flow_samples_per_obs) for _ in range(config.grad_accum_steps)]
    update(state, config, batches[:2], parallel)  # all micro-batches after the first one find its gradients
    live.moment = "evaluation"
    if evaluation.holdout:
        with contextlib.ExitStack() as stack, torch.no_grad():
            live.in_shards = True
            stack.enter_context(state.ema_weights())
            live.in_shards = False
            loss_sum(parallel.forward, batch(samples, FLOW_SAMPLES), "all")
            if evaluation.chunk_samples:  # sampling: the same forward passes, with one noise each
                loss_sum(parallel.forward, batch(min(samples, evaluation.chunk_samples), 1), "all")
            live.in_shards = True  # while the EMA weights go back


def held_out_images(sizes: Pi0Config, cameras: Iterable[str], samples: int) -> Tensor:
    """The images of held-out samples as they wait for their evaluation, as bytes."""
    side = sizes.image_size
    return torch.empty(samples, len(tuple(cameras)), side, side, 3, dtype=torch.uint8)


def example_batch(
    sizes: Pi0Config, cameras: Iterable[str], samples: int, flow_samples: int, device: torch.device
) -> Batch:
    """A batch of zeros with the shapes and dtypes that `Samples.finish` gives, its prompts of the largest length."""
    side, length = sizes.image_size, sizes.require("max_token_len")
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
    return Batch(observation, zeros(*chunk), is_real, zeros(flow_samples, *chunk), zeros(flow_samples), indices=())


# bitsandbytes' AdamW8bit: moments of smaller arrays are float32; of others each block has a float32 scale.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


class _Moments(torch.optim.Optimizer):
    """The memory of the recipe's optimizer: its moments. The updates themselves are computed in place."""

    def __init__(self, shards: list[nn.Parameter], kind: Optimizer, live: _LiveTensors) -> None:
        super().__init__(shards, {})
        for shard in shards:
            self.state[shard] = dict(enumerate(self._moments(shard, kind, live)))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update nothing: no memory is allocated."""

    @staticmethod
    def _moments(shard: Tensor, kind: Optimizer, live: _LiveTensors) -> Iterator[Tensor]:
        for _ in range(2):
            if kind == "adamw" or shard.numel() < _MIN_8BIT:
                moment = torch.empty_like(shard, requires_grad=False)
                live.count(moment, "optimizer")
                yield moment
            else:
                for dtype, count in ((torch.uint8, shard.numel()), (torch.float32, -(-shard.numel() // _BLOCK_8BIT))):
                    moment = torch.empty(count, dtype=dtype, device=shard.device)
                    live.count(moment, "optimizer", num_bytes(moment))
                    yield moment


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Bytes of a process' shard: FSDP cuts along the first dimension, and pads to equal shards."""
    if shards == 1 or not tensor.ndim:
        return num_bytes(tensor)
    return -(-tensor.shape[0] // shards) * (num_bytes(tensor) // max(tensor.shape[0], 1))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Weights that FSDP gathers at once."""

    modules: Sequence[nn.Module]
    """Run one after the other."""
    parameters: Sequence[nn.Parameter]
    dtype: torch.dtype | None
    """None: each weight in its own."""

    def gathered(self, *, trainable: bool = False) -> int:
        """Bytes of the gathered weights, or of their gradients, which have the same dtype."""
        kept = [p for p in self.parameters if p.requires_grad or not trainable]
        return sum(p.numel() * (self.dtype or p.dtype).itemsize for p in kept)

    def reduced(self) -> int:
        """Bytes of the buffer in which its gradients are summed."""
        return sum(num_bytes(p) for p in self.parameters if p.requires_grad)


def _gathered_groups(model: Pi0) -> list[_Group]:
    """Those of the layers, and last the root's."""
    groups, seen = [], set[int]()
    root: tuple[list[nn.Module], None] = ([model], None)
    for modules, dtype in (*shard_groups(model), root):
        own = [p for module in modules for p in module.parameters() if id(p) not in seen]
        seen |= set(map(id, own))
        groups.append(_Group(modules, own, dtype))
    return groups


def _follow(groups: Sequence[_Group], live: _LiveTensors) -> None:
    """Count gathered weights and gradients while each group is at work. The root's weights are gathered all the time.

    In the forward pass a group's weights are gathered into one buffer and copied out of it, while the buffer of the
    group before is still there. In the backward pass the next group's buffer is filled meanwhile, gradients are whole,
    and those of the group before are in the buffer that is reduced.
    """
    if not groups:
        return
    *inner, root = groups
    always, reducing = root.gathered(), [0]
    live.set_gathered(always)

    def watch(group: _Group) -> None:
        forward = always + 3 * group.gathered()
        backward = always + 2 * group.gathered() + group.gathered(trainable=True)

        def forward_begins(module: nn.Module, args: Any) -> None:
            if torch._C._current_graph_task_id() == -1:  # else it runs again in the backward pass, for its activations
                reducing[0] = 0
                live.set_gathered(forward)

        def backward_begins(gradient: Tensor) -> None:
            live.set_gathered(backward + reducing[0])
            reducing[0] = group.reduced()

        def forward_ends(module: nn.Module, args: Any, out: Any) -> None:
            tensor = out if isinstance(out, Tensor) else out[0]
            if tensor.requires_grad:
                tensor.register_hook(backward_begins)

        group.modules[0].register_forward_pre_hook(forward_begins)
        group.modules[-1].register_forward_hook(forward_ends)

    for group in inner:
        if group.dtype is not None:
            live.gather_in(group.parameters, group.dtype)
        watch(group)
