"""The demo's episodes in the viewer Rerun: the first one of each task, as in its video."""

import contextlib
import dataclasses
from functools import partial
from typing import Any

from torchpi.demo.page import Demo
from torchpi.errors import SimulationError
from torchpi.sim import Environment, LatestEnvironment
from torchpi.sim.actors import noise_shape
from torchpi.sim.evaluate import one_thread
from torchpi.sim.rollout import Rollout, RolloutStep, episode_noise, run_episode
from torchpi.ui.progress import progress_bar


def log_episodes(demo: Demo, log: Any) -> None:
    """Run these episodes again, which are decided by their seeds, and log them one after the other to a `RerunLog`."""
    policy, evaluation = demo.policy, demo.evaluation
    if evaluation is None:
        raise SimulationError(f"There are no episodes for Rerun, as nothing can be rendered: {demo.problem}.")
    first = [episode for episode in evaluation.episodes if episode.index == 0]
    shape = noise_shape(policy, evaluation.num_samples)
    assert shape is not None
    rollout = Rollout(**{field.name: getattr(evaluation, field.name) for field in dataclasses.fields(Rollout)})
    seen, began = log.robot(policy.metadata), 0.0
    with (
        one_thread(),
        contextlib.closing(LatestEnvironment(evaluation.env)) as latest,
        progress_bar("episodes for Rerun", len(first)) as advance,
    ):
        for episode in first:
            environment, text = latest.of(episode.task), evaluation.tasks[episode.task].instruction
            period = 1 / (environment.embodiment.control_hz or 1)
            show = partial(_show, seen, environment, text, began, period)
            noise = episode_noise(evaluation.seed, episode.task, 0, shape)
            outcome = run_episode(
                policy, environment, episode.seed, instruction=text, rollout=rollout, noise=noise, callback=show
            )
            began += outcome.steps * period
            advance()


def _show(seen: Any, environment: Environment, text: str, began: float, period: float, step: RolloutStep) -> None:
    """Log a step of an episode that has begun at a time."""
    now = began + step.step * period
    if step.executed:
        seen.execute(now - period, step.chunk[step.executed - 1])
    else:
        seen.predict(now, step.chunk)
    if step.executed == 0 or step.step % 2 == 0:
        seen.observe(now, environment.observe() | {"prompt": text})
