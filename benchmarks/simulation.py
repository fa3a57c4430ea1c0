"""Rates of rendering, demonstrations, chunks and closed loop in simulation on this machine.

python benchmarks/simulation.py [--policy demo] [--env metaworld] [--task drawer-open] [--repeats 5] [--as-json]
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import tyro

from torchpi.policy import Policy, load_policy
from torchpi.sim import make_environment
from torchpi.sim.environment import Environment, environment_seed
from torchpi.sim.rollout import Rollout, episode_noise, run_episode


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """Medians over the repeats, in one process with one thread."""

    frames_per_second: float
    """Rendered images per second, over all cameras."""
    expert_episode_seconds: float
    """Duration of a demonstration with both cameras rendered at every step, without writing it."""
    chunk_ms: float
    """Milliseconds from an observation to its chunk."""
    steps_per_second: float
    """Closed-loop rate: simulation, with rendering and policy once per chunk."""


def bench_simulation(policy: str, env: str, task: str, *, repeats: int) -> SimulationResult:
    """Measure with one thread, like the worker processes of `record` and `evaluate`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    environment, loaded = make_environment(env, task), load_policy(policy, device="cpu")
    try:
        environment.reset(environment_seed("eval", 0, task, 0))
        observation = environment.observe()
        cameras = sum(isinstance(value, np.ndarray) and value.ndim == 3 for value in observation.values())
        config = loaded.model.config
        noise = episode_noise(0, task, 0, config.chunk_shape)
        return SimulationResult(
            frames_per_second=50 * cameras / _median(lambda: _render(environment, 50), repeats),
            expert_episode_seconds=_median(lambda: _demonstrate(environment, task), repeats),
            chunk_ms=1e3 * _median(lambda: loaded.infer(observation, noise=noise(0)), 5 * repeats),
            steps_per_second=statistics.median(_closed_loop(loaded, environment, task) for _ in range(repeats)),
        )
    finally:
        environment.close()
        torch.set_num_threads(before)


def _median(run: Callable[[], object], repeats: int) -> float:
    run()  # warm-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _render(environment: Environment, count: int) -> None:
    for _ in range(count):
        environment.observe()


def _demonstrate(environment: Environment, task: str) -> None:
    environment.reset(environment_seed("record", 0, task, 0))
    for _ in range(environment.max_steps):
        environment.observe()
        if environment.step(environment.expert_action()):
            return


def _closed_loop(policy: Policy, environment: Environment, task: str) -> float:
    config, execute = policy.model.config, policy.embodiment.execute_steps
    noise = episode_noise(0, task, 0, config.chunk_shape)
    outcome = run_episode(
        policy, environment, environment_seed("eval", 0, task, 0), rollout=Rollout(execute_steps=execute), noise=noise
    )
    return outcome.steps / outcome.seconds


def main(
    policy: str = "demo", env: str = "metaworld", task: str = "drawer-open", repeats: int = 5, as_json: bool = False
) -> None:
    """Measure and print."""
    result = bench_simulation(policy, env, task, repeats=repeats)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"{env}, {task}, {policy}; one process, one thread:\n"
        f"  rendering          {result.frames_per_second:6.0f} frames/s\n"
        f"  expert episode     {result.expert_episode_seconds:6.2f} s with every frame\n"
        f"  one action chunk   {result.chunk_ms:6.1f} ms\n"
        f"  closed loop        {result.steps_per_second:6.0f} steps/s"
    )


if __name__ == "__main__":
    tyro.cli(main)
