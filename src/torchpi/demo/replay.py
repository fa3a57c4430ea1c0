"""Log of the demo's episodes for the Rerun viewer: the first one of each task, as in its video."""

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
    """Repeat these episodes, which their seeds determine, and log them one after the other to a `RerunLog`."""
    policy, evaluation = demo.policy, demo.evaluation
    if evaluation is None:
        raise SimulationError(f"There are no episodes for Rerun, as nothing can be rendered: {demo.problem}.")
    first_episodes = [episode for episode in evaluation.episodes if episode.index == 0]
    shape = noise_shape(policy, evaluation.num_samples)
    assert shape is not None
    rollout = Rollout(**{field.name: getattr(evaluation, field.name) for field in dataclasses.fields(Rollout)})
    robot_log, start = log.robot(policy.metadata), 0.0
    with (
        one_thread(),
        contextlib.closing(LatestEnvironment(evaluation.env)) as latest,
        progress_bar("episodes for Rerun", len(first_episodes)) as advance,
    ):
        for episode in first_episodes:
            environment, prompt = latest.of(episode.task), evaluation.tasks[episode.task].instruction
            period = 1 / (environment.embodiment.control_hz or 1)
            noise = episode_noise(evaluation.seed, episode.task, 0, shape)
            callback = partial(_log_step, robot_log, environment, prompt, start, period)
            outcome = run_episode(
                policy, environment, episode.seed, instruction=prompt, rollout=rollout, noise=noise, callback=callback
            )
            start += outcome.steps * period
            advance()


def _log_step(log: Any, environment: Environment, prompt: str, start: float, period: float, step: RolloutStep) -> None:
    """Log a step of an episode; its start and the period of a step are in seconds."""
    now = start + step.step * period
    if step.executed:
        log.execute(now - period, step.chunk[step.executed - 1])
    else:
        log.predict(now, step.chunk)
    if step.executed == 0 or step.step % 2 == 0:
        log.observe(now, environment.observe() | {"prompt": prompt})
