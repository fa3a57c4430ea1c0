"""Time of sampling with guidance towards the current chunk (real-time chunking), compared with plain sampling.

    python benchmarks/guidance.py mid demo --pairs 7

Each argument is "mid" (47 M parameters) or a preset, with random weights, or a policy, timed from observation
to actions.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import tyro

from torchpi.bench.floor import timed
from torchpi.bench.model import bench_config, make_observation
from torchpi.config import PRESETS
from torchpi.errors import UsageError
from torchpi.model.operations import Workload
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import Guidance
from torchpi.policy import load_policy
from torchpi.types import PreviousChunk

NUM_STEPS = 10


@dataclasses.dataclass(frozen=True)
class GuidedTime:
    """Times of one model on the CPU, batch 1, 10 Euler steps: medians over pairs of a plain and a guided sampling."""

    model: str
    pairs: int
    plain_seconds: float
    guided_seconds: float
    ratio: float
    """Median over the pairs of guided / plain."""


def bench_guided(name: str, *, pairs: int) -> GuidedTime:
    """Time both alternately, because the speed of a shared machine drifts."""
    if pairs < 1:
        raise UsageError(f"pairs is {pairs}; expected a positive number.")
    sample = _sample_model(name) if name in ("mid", *PRESETS) else _sample_policy(name)
    cpu = torch.device("cpu")
    plain, guided = [], []
    for pair in range(-1, pairs):
        times = [timed(lambda guide=guide: sample(guide), cpu) for guide in (False, True)]  # type: ignore[misc]
        if pair >= 0:  # pair -1 is the warm-up
            plain.append(times[0])
            guided.append(times[1])
    ratios = [one / other for one, other in zip(guided, plain, strict=True)]
    return GuidedTime(name, pairs, statistics.median(plain), statistics.median(guided), statistics.median(ratios))


def _sample_model(name: str) -> Callable[[bool], None]:
    """Create a sampling function of a model with random weights, three cameras and 60 prompt tokens."""
    config = bench_config(name)
    work = Workload(config, 1, num_cameras=3, prompt_tokens=60, num_steps=NUM_STEPS, dtype=torch.float32)
    model = Pi0(config).eval()
    observation = make_observation(work, torch.device("cpu"))
    shape = (1, *config.chunk_shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(target=torch.zeros(shape), weight=torch.ones(shape))

    def sample(guide: bool) -> None:
        model.sample_actions(observation, noise=noise, num_steps=NUM_STEPS, guidance=guidance if guide else None)

    return sample


def _sample_policy(path: str) -> Callable[[bool], None]:
    """Create an inference function of a policy, guided by the second half of one of its chunks."""
    policy = load_policy(path, device="cpu")
    observation, config = policy.example_observation(), policy.model.config
    horizon = config.require("action_horizon")
    noise = np.random.default_rng(0).standard_normal((1, horizon, config.action_dim), np.float32)
    (chunk,) = policy.infer_batch([observation], noise=noise, num_steps=NUM_STEPS)
    half = horizon // 2
    prefix = PreviousChunk(chunk["actions"][half:], horizon // 4, half, method="guidance")

    def sample(guide: bool) -> None:
        policy.infer_batch([observation], noise=noise, num_steps=NUM_STEPS, prefixes=[prefix if guide else None])

    return sample


def main(
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mid", "demo"), pairs: int = 7, as_json: bool = False
) -> None:
    """Measure and print.

    Args:
        models: mid or a preset, with random weights, or a policy.
        pairs: number of pairs of a plain and a guided sampling.
        as_json: print one JSON document.
    """
    results = [bench_guided(name, pairs=pairs) for name in models]
    for each in results:
        print(
            f"{each.model}, sampling: {1e3 * each.plain_seconds:.1f} ms, with guidance "
            f"{1e3 * each.guided_seconds:.1f} ms, {each.ratio:.2f} × (medians of {each.pairs} pairs)",
            file=sys.stderr if as_json else sys.stdout,
        )
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in results]))


if __name__ == "__main__":
    tyro.cli(main)
