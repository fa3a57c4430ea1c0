"""Checks of `gpu_acceptance.py`: the properties that the tests check without a GPU, checked on one.

Each check is a name and a function that returns a difference and its tolerance. Differences are relative, the largest
of |a − b| / (|b| + mean |b|); checks of rounding use ratios of mean errors.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from torchpi.bench.model import make_observation
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.engine import InferenceEngine
from torchpi.engine.kernels import PLAIN, Kernels, triton_kernels
from torchpi.engine.quantize import FP8_CAPABILITY, quantize_model, quantized_layers
from torchpi.model.operations import Workload
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance, prefix_weights
from torchpi.policy import load_policy
from torchpi.training.config import OptimConfig, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import update
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState
from torchpi.types import Observation

Check = tuple[str, Callable[[], tuple[float, float]]]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = Pi0Config(
    pi05=True,
    paligemma_variant=GemmaConfig(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32),
    action_expert_variant=GemmaConfig(width=48, depth=3, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=32),
    siglip_variant=VisionConfig(width=48, depth=2, mlp_dim=64, num_heads=3, patch=14),
    vocab_size=300,
    image_size=28,
    action_dim=6,
    action_horizon=10,
    max_token_len=200,
)
RTC: tuple[tuple[str, ...], ...] = ((), ("guidance",), ("action_prefix",), ("guidance", "action_prefix"))
NUM_STEPS, FLOAT32, ONE_STEP = 4, 1e-3, 2**-7
"""Euler steps; float32 tolerance for a whole model; relative distance of adjacent bfloat16 numbers."""


def difference(got: Any, expected: Any) -> float:
    """Largest relative difference of tensors in any structure; NaN if one is not finite."""
    found = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        if not (a.isfinite().all() and b.isfinite().all()):
            return float("nan")
        found = max(found, float(((a - b).abs() / (b.abs() + b.abs().mean()).clamp_min(1e-30)).max()))
    return found


def random_weights(model: Pi0, scale: float = 1.0) -> Pi0:
    """Fill all weights on their device: matrices with deviation scale/√inputs, all others near 0, norms near 1."""
    generator = torch.Generator(model.device).manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            deviation = scale * weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.1
            weight.normal_(0, deviation, generator=generator)
            if "norm" in name and name.startswith("vision") and name.endswith("weight"):
                weight += 1
    return model.eval()


# ---- kernels ----


def kernel_checks(device: torch.device, full: bool) -> Iterator[Check]:
    """Compare every Triton kernel with its plain reference, in float32 and bfloat16."""
    kernels = triton_kernels()
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):
        for label, name, arguments in _kernel_calls(device, dtype, full):
            run = functools.partial(_compare_kernel, kernels, name, arguments, dtype)
            yield f"{name}, {label}, {str(dtype)[6:]}", run


def _compare_kernel(
    kernels: Kernels, name: str, arguments: Callable[[], Sequence[Any]], dtype: torch.dtype
) -> tuple[float, float]:
    mine = arguments()
    theirs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, mine)
    if name in (
        "geglu",
        "linear_geglu",
        "attend",
    ):  # the reference rounds intermediate values, the kernel only its result
        theirs = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, theirs)
    got = getattr(kernels, name)(*mine)
    with sdpa_kernel(SDPBackend.MATH):
        expected = getattr(PLAIN, name)(*theirs)
    if name == "split_rope_store":  # the cache as well
        got, expected = (got, *mine[3:5]), (expected, *theirs[3:5])
    roundings = 2 if name in ("attend", "ada_rms_norm") else 1
    tolerance = 1e-4 if dtype is torch.float32 else ONE_STEP * roundings
    return difference(got, expected), tolerance


def _kernel_calls(
    device: torch.device, dtype: torch.dtype, full: bool
) -> Iterator[tuple[str, str, Callable[[], Sequence[Any]]]]:
    """Label, operation and arguments at the shapes of π₀.₅ with three cameras, or at small ones."""
    prefix, suffix, width, expert, head = (968, 50, 2048, 1024, 256) if full else (40, 7, 64, 48, 32)
    hidden, vision = (16_384, (3, 256, 1152)) if full else (128, (3, 16, 72))
    # At full size the two kernels with matmuls support only 16-bit dtypes: float32 exceeds the shared memory.
    narrow = full and dtype is torch.float32
    depth, dim = (256, 64) if narrow else (expert, head)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(len(shape)), device=device).to(dtype)

    def residual(*shape: int) -> tuple[Tensor, Tensor]:
        return tuple(normal(2, *shape).unbind())  # type: ignore[return-value]

    def rope(tokens: int, start: int) -> Sequence[Any]:
        angle = 300 * torch.rand(1, tokens, head // 2, device=device, generator=torch.Generator(device).manual_seed(0))
        return normal(1, tokens, 10 * head), angle.cos(), angle.sin(), *residual(1, prefix + suffix, 1, head), start

    def attention(batch: int, tokens: int, slots: int, num_prefix: int, state: int = 0) -> Sequence[Any]:
        valid = torch.arange(num_prefix, num_prefix - batch, -1, dtype=torch.int32, device=device)
        return normal(batch, tokens, 8, dim), *residual(batch, slots, 1, dim), valid, num_prefix, state

    def gated(rows: int) -> Sequence[Any]:
        (x, y), (gates, modulation) = residual(1, suffix, expert), residual(1, rows, 3 * expert)
        return x, modulation, y, gates

    yield "backbone", "rms_norm", lambda: (normal(1, prefix, width),)
    yield "backbone, residual", "rms_norm", lambda: residual(1, prefix, width)
    yield "expert", "ada_rms_norm", lambda: (normal(1, suffix, expert), normal(1, 1, 3 * expert))
    yield "expert, residual", "ada_rms_norm", lambda: gated(1)
    yield "expert, residual, per token", "ada_rms_norm", lambda: gated(suffix)
    yield "SigLIP", "layer_norm", lambda: (normal(*vision), *residual(vision[-1]))
    yield "SigLIP, residual", "layer_norm", lambda: (normal(*vision), *residual(vision[-1]), residual(*vision)[0])
    yield "backbone", "split_rope_store", lambda: rope(prefix, 0)
    yield "expert", "split_rope_store", lambda: rope(suffix, prefix)
    yield "backbone", "geglu", lambda: (4 * normal(1, prefix, 2 * hidden),)
    yield f"expert, {depth} wide", "linear_geglu", lambda: (
        normal(1, suffix, depth), normal(8 * depth, depth) * depth**-0.5
    )  # fmt: skip
    # Triton's interpreter rounds to e4m3 differently from a GPU.
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    yield "SigLIP", "to_fp8", lambda: (normal(*vision), 0.01 if has_fp8 else None)
    heads, slots = f"8 heads of {dim}", prefix + suffix
    yield f"backbone, {heads}", "attend", lambda: attention(1, prefix, prefix, prefix)
    yield f"expert, {heads}", "attend", lambda: attention(1, suffix, slots, prefix)
    yield f"π₀'s expert, {heads}", "attend", lambda: attention(1, suffix + 1, slots + 1, prefix, 1)
    yield f"expert, batch 8, {heads}", "attend", lambda: attention(8, suffix, slots, prefix)


# ---- engine ----


@dataclasses.dataclass(frozen=True)
class Samples:
    """Small model and its sampling inputs."""

    device: torch.device
    model: Pi0

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype = torch.float32, *, pi05: bool = True) -> "Samples":
        """Create a model with random weights, large enough for actions of order 1."""
        config = dataclasses.replace(SMALL, pi05=pi05)
        return cls(device, random_weights(Pi0(config, device=device, dtype=dtype), scale=1.0))

    def arguments(self, batch: int, rtc: Sequence[str] = (), *, tokens: int = 17, steps: int = NUM_STEPS) -> Any:
        """Observation and keywords of `sample_actions`."""
        observation = make_observation(Workload(SMALL, batch, 2, tokens, steps, torch.float32), self.device)
        generator = torch.Generator().manual_seed(2)
        shape = (batch, SMALL.require("action_horizon"), SMALL.action_dim)
        noise, chunk = torch.randn((2, *shape), generator=generator).to(self.device)
        delay = torch.arange(batch, device=self.device) % 3
        weight = prefix_weights(shape[1], delay, delay + 2)[:, :, None].expand_as(chunk).contiguous()
        known = torch.arange(shape[1], device=self.device) < delay[:, None]
        previous = {"guidance": Guidance(chunk, weight), "action_prefix": ActionPrefix(chunk, known)}
        keywords = {"noise": noise, "num_steps": steps, **{name: previous[name] for name in rtc}}
        return observation, keywords

    def engine(self, mode: str, **settings: Any) -> InferenceEngine:
        """Create an engine. On a GPU it uses the Triton kernels (except "compiled"), also in float32."""
        if mode != "compiled" and self.device.type == "cuda":
            settings["kernels"] = triton_kernels()
        return InferenceEngine(self.model, mode=mode, **settings)  # type: ignore[arg-type]


def engine_checks(device: torch.device, modes: Sequence[str]) -> Iterator[Check]:
    """Compare the engine with the plain model."""
    samples = Samples.make(device)

    def same(engine: InferenceEngine, batch: int, rtc: Sequence[str]) -> tuple[float, float]:
        found = 0.0
        for tokens in (30, 17):  # the second call reuses the static tensors of the first
            observation, keywords = samples.arguments(batch, rtc, tokens=tokens)
            expected = samples.model.sample_actions(observation, **keywords)
            found = max(found, difference(engine.sample_actions(observation, **keywords), expected))
        if len(engine.metadata["warm_buckets"]) == 0:
            raise RuntimeError("The engine prepared no bucket; the plain model sampled.")
        if device.type == "cuda" and engine.mode != "compiled" and engine.metadata["kernels"] == "plain":
            raise RuntimeError("PyTorch's operations replaced the fused kernels, which failed; see the warning above.")
        return found, FLOAT32

    for mode in modes:
        engine = functools.cache(functools.partial(samples.engine, mode))
        for rtc in RTC:
            for batch in (1, 3):
                name = f"engine {mode}, {' + '.join(rtc) or 'plain'}, batch {batch}"
                yield name, lambda engine=engine, batch=batch, rtc=rtc: same(engine(), batch, rtc)  # type: ignore[misc]
        if mode == modes[0]:
            yield f"engine {mode}, bfloat16: its error over the plain model's", lambda: _rounding(device, modes[0])
            for name, check in (
                ("two threads, each with a stream", _threads),
                ("eviction", _eviction),
                ("background", _background),
            ):
                yield f"engine {mode}, {name}", functools.partial(check, samples, mode)
            yield f"engine {mode}, Policy.infer", functools.partial(_policy, device, mode)
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        yield "fp8 against its emulation, mean", functools.partial(_fp8, device, modes[0])


def _rounding(device: torch.device, mode: str) -> tuple[float, float]:
    samples, exact = Samples.make(device, torch.bfloat16), Samples.make(device)
    exact.model.load_state_dict(samples.model.state_dict())
    observation, keywords = samples.arguments(3)
    expected = exact.model.sample_actions(observation, **keywords)
    errors = [
        (sampler.sample_actions(observation, **keywords) - expected).abs().mean()
        for sampler in (samples.engine(mode), samples.model)
    ]
    return float(errors[0] / errors[1]), 1.5


def _threads(samples: Samples, mode: str) -> tuple[float, float]:
    engine, calls = samples.engine(mode), [samples.arguments(3, tokens=tokens) for tokens in (9, 20)]
    expected = [samples.model.sample_actions(observation, **keywords) for observation, keywords in calls]
    found: list[list[float]] = [[], []]
    on_gpu = samples.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()  # the threads' streams do not wait for tensors created here

    def sample(which: int) -> None:
        observation, keywords = calls[which]
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
            for _ in range(20):
                found[which].append(difference(engine.sample_actions(observation, **keywords), expected[which]))

    threads = [threading.Thread(target=sample, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if [len(each) for each in found] != [20, 20]:
        raise RuntimeError("A thread ended with an error, see above.")
    return max(*found[0], *found[1]), FLOAT32


def _eviction(samples: Samples, mode: str) -> tuple[float, float]:
    engine, found = samples.engine(mode, max_buckets=1), []
    for steps in (1, 2, 1):
        observation, keywords = samples.arguments(1, steps=steps)
        expected = samples.model.sample_actions(observation, **keywords)
        found.append(difference(engine.sample_actions(observation, **keywords), expected))
    if len(engine.metadata["warm_buckets"]) != 1:
        raise RuntimeError(f"max_buckets is 1, but {engine.metadata['warm_buckets']} are warm.")
    return max(found), FLOAT32


def _background(samples: Samples, mode: str) -> tuple[float, float]:
    """Check that the plain model samples while the bucket warms up in a thread, and the engine afterwards."""
    engine, found = samples.engine(mode, background=True), []
    observation, keywords = samples.arguments(1)
    expected, end = samples.model.sample_actions(observation, **keywords), time.monotonic() + 60
    while not (was_warm := bool(engine.metadata["warm_buckets"])) and time.monotonic() < end:
        found.append(difference(engine.sample_actions(observation, **keywords), expected))
    found.append(difference(engine.sample_actions(observation, **keywords), expected))
    engine.close()
    if not was_warm:
        raise RuntimeError("The bucket was not warm after 60 s.")
    return max(found), FLOAT32


def _policy(device: torch.device, mode: str) -> tuple[float, float]:
    """Compare the embedded policy's chunk, and one that continues it, with the plain model's on the CPU."""
    chunks = []
    for where, engine in ((torch.device("cpu"), "eager"), (device, mode)):
        policy = load_policy("demo", device=where, dtype=torch.float32)
        if engine != "eager":
            policy.engine = InferenceEngine(policy.model, mode=engine)  # type: ignore[arg-type]
        config = policy.model.config
        shape = (config.require("action_horizon"), config.action_dim)
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        observation = policy.example_observation()
        first = policy.infer(observation, noise=noise, num_steps=2)["actions"]
        second = policy.infer(observation, noise=noise, num_steps=2, action_prefix=first[2:], delay=1)["actions"]
        chunks.append([torch.as_tensor(chunk) for chunk in (first, second)])
    return difference(chunks[1], chunks[0]), FLOAT32


def _fp8(device: torch.device, mode: str) -> tuple[float, float]:
    samples, actions = Samples.make(device, torch.bfloat16), []
    observation, keywords = samples.arguments(3)
    quantize_model(samples.model, "fp8", lambda: samples.model.sample_actions(observation, **keywords))
    for emulated in (True, False):
        for layer in quantized_layers(samples.model).values():
            layer.emulated = emulated
        sampler = samples.model if emulated else samples.engine(mode)
        actions.append(sampler.sample_actions(observation, **keywords))
    return float((actions[1] - actions[0]).abs().mean() / actions[0].abs().mean()), 0.02


# ---- training ----


def training_checks(device: torch.device) -> Iterator[Check]:
    """Compare loss, gradients and updates with the CPU's."""
    for pi05 in (True, False):
        name = "π₀.₅" if pi05 else "π₀"
        here = Samples.make(torch.device("cpu"), pi05=pi05).model
        there = copy.deepcopy(here).to(device)
        yield f"loss and gradients, {name}", functools.partial(_gradients, here, there)
        yield f"two updates with AdamW and EMA, {name}: share of the change", functools.partial(_updates, here, there)


def _batch(device: torch.device) -> Batch:
    observation: Observation = make_observation(Workload(SMALL, 4, 2, 17, 1, torch.float32), device, padded=False)
    shape, generator = (4, 2, SMALL.require("action_horizon"), SMALL.action_dim), torch.Generator().manual_seed(3)
    noise, other = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    is_real = torch.ones_like(other[:, 0], dtype=torch.bool)
    time = torch.rand(shape[:2], generator=generator).to(device)
    return Batch(observation, other[:, 0], is_real, noise, time, indices=())


def _gradients(*models: Pi0) -> tuple[float, float]:
    results = []
    for model in models:
        batch = _batch(model.device)
        loss = model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time)
        loss.mean().backward()
        # The last backbone layer has unused weights.
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append([loss.detach(), *gradients])
        model.zero_grad()
    # Elements near 0 are cancelling sums, so each gradient is compared by its norm.
    ratios = [float((a.cpu() - b).norm() / b.norm().clamp_min(1e-12)) for b, a in zip(*results, strict=True)]
    return max(ratios), FLOAT32


def _updates(*models: Pi0) -> tuple[float, float]:
    config = TrainConfig(batch_size=4, optim=OptimConfig(lr=1e-3, warmup_steps=0, flow_samples_per_obs=2))
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    losses, after = [], []
    for model in models:
        state = TrainState.create(model, weight_decay=config.optim.weight_decay, ema=True)
        batch, parallel = _batch(model.device), single_process(model)
        losses.append(torch.tensor([update(state, config, [batch], parallel)[0] for _ in range(2)]))
        after.append([parameter.detach().cpu() for parameter in (*model.parameters(), *state.ema.values())])
    count = len(before)
    # AdamW moves weights whose gradient is only rounding noise by a whole step, so the mean is compared.
    moved = sum(float((a - b).abs().sum()) for a, b in zip(after[0][:count], before, strict=True))
    apart = sum(float((a - b).abs().sum()) for a, b in zip(after[1], after[0], strict=True))
    return max(apart / moved, 10 * difference(losses[1], losses[0])), 0.01
