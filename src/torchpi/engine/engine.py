"""Inference engine: `Pi0.sample_actions` in buckets of static shapes, each compiled or captured once."""

import collections
import concurrent.futures
import contextlib
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchpi.engine.bucket import Bucket, Inputs, make_inputs
from torchpi.engine.kernels import PLAIN, Kernels, triton_kernels
from torchpi.engine.packed import PackedModel
from torchpi.engine.runner import GraphMemory, Mode, Runner
from torchpi.errors import ModelError
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance, Samples, check_previous
from torchpi.types import Observation

PROMPT_LENGTHS = (32, 64, 128, 200)
BATCH_SIZES = (1, 2, 4, 8)
MAX_BUCKETS = 16
_warm_up_lock = threading.Lock()  # one per process, which can only capture one CUDA graph at a time


class InferenceEngine:
    """Samples actions as the model does, with the same weights, in few kernel launches.

    The plain model samples inputs that fit no bucket. A bucket warms up in its first call; with `background`, it warms
    up in a thread while the plain model samples. Calls from several threads and CUDA streams run one after another.
    """

    @torch.inference_mode(False)  # guidance needs gradients through the packed weights
    def __init__(
        self,
        model: Pi0,
        *,
        mode: Mode = "compiled",
        kernels: Kernels | None = None,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_buckets: int = MAX_BUCKETS,
        background: bool = False,
    ) -> None:
        """Pack the model's weights, which must not change after that.

        Args:
            mode: "graph" captures a CUDA graph per bucket, "compiled" uses torch.compile, "eager" neither.
            kernels: by default Triton's for graphs in 16 bits, and PyTorch's operations otherwise.
            prompt_lengths: numbers of prompt tokens that inputs are padded to, in addition to the model's maximum.
            batch_sizes: numbers of samples that inputs are padded to.
            max_buckets: number of buckets to keep; the least recently used one is dropped.
            background: warm up in a thread. The first chunks then come from the plain model, which rounds differently,
                so runs are not bitwise reproducible.

        Raises:
            ValueError: the mode is unknown or does not run on the model's device, or the model has LoRA layers.
        """
        if mode not in get_args(Mode):
            raise ModelError(f"Unknown engine {mode!r}; expected one of {', '.join(get_args(Mode))}.")
        check_device(mode, model.device)
        if max_buckets < 1 or min(batch_sizes, default=0) < 1 or min(prompt_lengths, default=0) < 1:
            raise ModelError(
                "max_buckets, prompt_lengths and batch_sizes must be positive, got "
                f"{max_buckets}, {list(prompt_lengths)} and {list(batch_sizes)}."
            )
        self.model, self.mode, self.device = model, mode, model.device
        self._arguments: dict[str, Any] = {"mode": mode, "kernels": kernels, "prompt_lengths": prompt_lengths}
        self._arguments |= {"batch_sizes": batch_sizes, "max_buckets": max_buckets, "background": background}
        self.packed = PackedModel(model, kernels or _best_kernels(model, mode))
        longest = model.config.max_token_len or max(prompt_lengths)
        self.prompt_lengths = sorted({length for length in prompt_lengths if length < longest} | {longest})
        self.batch_sizes, self.max_buckets = sorted(batch_sizes), max_buckets
        self._runners: collections.OrderedDict[Bucket, Runner] = collections.OrderedDict()  # most recently used last
        self._failed: set[Bucket] = set()
        self._queued: set[Bucket] = set()
        self._lock = threading.Lock()  # for the collections above and the runners' static tensors
        self.background, self._closed = background, False
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "engine")  # starts its thread at the first bucket
        self._memory = GraphMemory(self.device) if mode == "graph" else None
        self._last_call = torch.cuda.Event() if mode != "eager" and self.device.type == "cuda" else None
        self._parts = _parts_of(model)
        self._versions = self._read_versions()
        _count_fused_steps()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a new engine of the copied model, which warms up its own buckets; also for other processes."""
        return functools.partial(InferenceEngine, **self._arguments), (self.model,)

    def sample_actions(
        self, observation: Observation, *, noise: Float32[Tensor, "B H A"] | None = None, **options: Any
    ) -> Float32[Tensor, "B H A"]:
        """`Pi0.sample_actions` with the same arguments; see `sample_many`."""
        if noise is not None:
            self.model.check_actions(observation, noise, "Noise")
            noise = noise[:, None]
        return self.sample_many(observation, noise=noise, **options).actions[:, 0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample_many(
        self,
        observation: Observation,
        *,
        noise: Float32[Tensor, "B R H A"] | None = None,
        num_samples: int = 1,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
        guidance: Guidance | None = None,
        action_prefix: ActionPrefix | None = None,
    ) -> Samples:
        """`Pi0.sample_many`. Pass the observation on the host to read its masks without waiting for the device.

        Raises:
            ValueError: as `Pi0.sample_many`, or the model's weights have changed since the engine packed them.
        """
        if noise is None:
            # A GPU's default generator cannot draw while a graph is being captured.
            with _warm_up_lock if self.mode == "graph" and generator is None else contextlib.nullcontext():
                noise = self.model.draw_noise(observation.batch_size, generator, num_samples)
        self.model.check_actions(observation, noise, "Noise", num_samples="R, ")
        check_previous(noise[:, 0], guidance, action_prefix)
        # Buckets compute in the model's dtype, so the caller's autocast must not apply.
        with torch.autocast("cuda" if self.device.type == "cuda" else "cpu", enabled=False):
            inputs = make_inputs(observation, noise, self.model.config.num_patches, guidance, action_prefix)
            samples = None if inputs is None else self._sample(inputs, num_steps)
            if samples is not None:
                return samples
            self._check_weights()
            rtc: dict[str, Any] = {"guidance": guidance, "action_prefix": action_prefix}
            observation, noise = observation.to(self.device), noise.to(self.device)
            return self.model.sample_many(observation, noise=noise, num_steps=num_steps, **rtc)

    def _sample(self, inputs: Inputs, num_steps: int) -> Samples | None:
        """Sample in the inputs' bucket; None if there is none, or it is not warm."""
        bucket = self._bucket(inputs, num_steps)
        if bucket is None or not self._is_warm(bucket):
            return None
        with self._lock:
            runner = self._runners.get(bucket)
            if runner is None:  # another thread has just dropped this bucket
                return None
            try:
                samples = self._run(runner, inputs)
            except Exception as error:
                self._check_weights()  # changed weights may be the cause
                if self.mode != "compiled":
                    raise
                # torch.compile may have to recompile, which fails under some modes that a caller may have set.
                warnings.warn(f"The plain model samples in place of compiled code: {_reason(error)}", stacklevel=4)
                return None
            self._check_weights()  # while the device is still working
            return samples

    def _run(self, runner: Runner, inputs: Inputs) -> Samples:
        """Run after the last call, even if that was on another stream: graphs share memory and static inputs."""
        if self._last_call is None:
            return runner(inputs)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._last_call)
        samples = runner(inputs)
        self._last_call.record(stream)
        return samples

    def _bucket(self, inputs: Inputs, num_steps: int) -> Bucket | None:
        """The smallest bucket that the inputs fit into; None if there is none."""
        batch, num_samples, horizon, _ = inputs.noise.shape
        sizes = [size for size in self.batch_sizes if size >= batch]
        lengths = [length for length in self.prompt_lengths if length >= inputs.tokens.shape[1]]
        size, width = self.model.config.image_size, self.model.config.action_dim
        if not sizes or not lengths or inputs.images.shape[2:4] != (size, size) or inputs.state.shape[1] != width:
            return None
        return Bucket(
            batch=sizes[0],
            cameras=len(inputs.images),
            prompt_tokens=lengths[0],
            horizon=horizon,
            num_samples=num_samples,
            num_steps=num_steps,
            guidance=None if inputs.guidance is None else inputs.guidance.maximum,
            action_prefix=inputs.action_prefix is not None,
        )

    def warm_up(self, bucket: Bucket) -> None:
        """Compile or capture a bucket now."""
        try:
            with torch.no_grad():
                times = self.model.step_conditionings(bucket.num_steps, action_prefix=bucket.action_prefix)
            runner = Runner(self.packed, bucket, self.mode, times, self._memory)
        except ModelError:  # a mistake in the caller's arguments
            raise
        except Exception as error:  # out of memory, or any error of a compiler, Triton or the driver
            self._fall_back(bucket, error)
            return
        with self._lock:
            self._runners[bucket] = runner
            while len(self._runners) > self.max_buckets:
                self._runners.popitem(last=False)

    def _fall_back(self, bucket: Bucket, error: Exception) -> None:
        """Retry a failed warm-up with plain kernels, or leave the bucket to the plain model."""
        if self.mode == "graph":  # a failed capture may still hold its memory and the device's generator
            self._memory = GraphMemory(self.device)
            generator = torch.cuda.default_generators[self.device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())
        if self.packed.kernels is not PLAIN and not isinstance(error, torch.OutOfMemoryError):
            warnings.warn(f"PyTorch's operations replace the fused kernels, which fail here: {error}", stacklevel=4)
            self.packed.kernels = PLAIN
            self.warm_up(bucket)
            return
        self._failed.add(bucket)
        text = f"The engine cannot prepare the bucket {bucket}; from now on the plain model samples in its place"
        warnings.warn(f"{text}: {_reason(error)}", stacklevel=4)

    @property
    def metadata(self) -> dict[str, Any]:
        """Mode, kernels and warm buckets."""
        with self._lock:
            warm = [str(bucket) for bucket in self._runners]
        return {"mode": self.mode, "kernels": self.packed.kernels.name, "warm_buckets": warm}

    def close(self) -> None:
        """Wait for the warm-up running in the background, and start no other."""
        self._closed = True
        self._executor.shutdown(cancel_futures=True)

    def _is_warm(self, bucket: Bucket) -> bool:
        """True if the bucket can be run. Otherwise start its warm-up, and wait for it unless in the background."""
        with self._lock:
            if bucket in self._runners:
                self._runners.move_to_end(bucket)
                return True
            if bucket in self._failed or self._closed:
                return False
            if self.background:
                if bucket not in self._queued:
                    self._queued.add(bucket)
                    self._executor.submit(self._prepare, bucket)
                return False
        self._check_weights()
        self._prepare(bucket)
        return bucket in self._runners

    def _prepare(self, bucket: Bucket) -> None:
        """Warm up a bucket: one at a time, and only once for all threads that need it."""
        try:
            with _warm_up_lock:
                if bucket not in self._runners and bucket not in self._failed:
                    self.warm_up(bucket)
        finally:
            self._queued.discard(bucket)

    def _read_versions(self) -> list[tuple[int, int]]:
        return [(part.data_ptr(), part._version) for _, _, part in self._parts if isinstance(part, Tensor)]

    def _check_weights(self) -> None:
        replaced = any(owner.get(name) is not part for owner, name, part in self._parts)
        if replaced or self._read_versions() != self._versions:
            raise ModelError("The model's weights changed after the engine had packed them; build a new engine.")


def check_device(mode: str, device: torch.device) -> None:
    """Raise an error if the engine mode does not run on the device."""
    if mode == "graph" and device.type != "cuda":
        raise ModelError(f'engine "graph" captures CUDA graphs; the device is {device}: use "compiled" or "eager".')


def _reason(error: Exception) -> str:
    return str(error).partition("\n\n")[0]  # without the advice for PyTorch's developers after it


def _parts_of(model: Pi0) -> list[tuple[dict[str, Any], str, Any]]:
    """Owning dict, name and value of every parameter and submodule, to detect replaced ones."""
    owners = [owner for module in model.modules() for owner in (module._parameters, module._modules)]
    return [(owner, name, part) for owner in owners for name, part in owner.items()]


@functools.cache
def _count_fused_steps() -> None:
    """Increment parameter versions in the steps of fused optimizers, as PyTorch only does for other optimizers."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(count)


def _best_kernels(model: Pi0, mode: Mode) -> Kernels:
    if mode != "graph" or model.compute_dtype is torch.float32:  # float32 tiles do not fit into shared memory
        return PLAIN
    try:
        return triton_kernels()
    except Exception as error:  # Triton is missing, or raises any other error
        warnings.warn(f"The engine runs without fused kernels: {error}", stacklevel=3)
        return PLAIN
