"""CPU time of LIBERO's parts in one process with one thread, and its memory.

python benchmarks/libero_times.py [--suite object] [--task 0]
"""

import dataclasses
import json
import resource
import time
from collections.abc import Callable

import numpy as np
import tyro

from torchpi.sim import environment_name, make_environment, simulator

STEPS = 20


@dataclasses.dataclass(frozen=True)
class LiberoTimes:
    """CPU times in seconds."""

    make: float
    """Creation of a task's environment."""
    reset: float
    """Reset to the first initial state, with 10 waiting actions."""
    first_observation: float
    """First observation, including the creation of the OpenGL context."""
    observation: float
    """Observation of both cameras and the state."""
    action: float
    """Action without an observation."""
    episode: float
    """Failed episode with an observation every 5 actions, without a policy."""
    peak_bytes: int
    """Peak memory of the process, without a policy."""


def main(suite: str = "object", task: str = "0") -> None:
    """Print the times as JSON.

    Args:
        suite, task: LIBERO suite and task.
    """
    env, made = environment_name("libero", suite), []
    make = _cpu(lambda: made.append(make_environment(env, task)))
    environment, max_steps = made[0], simulator(env).max_steps
    reset = _cpu(lambda: environment.reset_to(0, 7))
    first, observation = _cpu(environment.observe), _cpu(lambda: [environment.observe() for _ in range(4)]) / 4
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 7))
    action = _cpu(lambda: [environment.step(action) for action in actions]) / STEPS
    episode = reset + max_steps * action + max_steps / 5 * observation
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dataclasses.asdict(LiberoTimes(make, reset, first, observation, action, episode, peak))))
    environment.close()


def _cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    tyro.cli(main)
