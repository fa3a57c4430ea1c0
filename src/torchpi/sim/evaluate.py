"""Success rates: many closed-loop episodes in parallel processes, the same for any number of them."""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchpi.errors import SimulationError, UnknownKeyError
from torchpi.policy import Policy
from torchpi.sim import LatestEnvironment, simulator
from torchpi.sim.actors import checked_rollout, chosen_tasks, close_actor, noise_shape, open_actor
from torchpi.sim.environment import environment_seed
from torchpi.sim.processes import default_workers, run_jobs
from torchpi.sim.result import Episode, Evaluation, success_rate, task_result
from torchpi.sim.rollout import Actor, EpisodeOutcome, Rollout, episode_noise, run_episode
from torchpi.sim.video import record_video
from torchpi.ui.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class _Job:
    task: str
    index: int
    seed: int
    instruction: str
    video: str | None

    def __str__(self) -> str:
        return f"episode {self.index} of {self.task} (seed {self.seed})"


def evaluate(
    policy: str | pathlib.Path | Actor,
    env: str,
    *,
    tasks: Sequence[str] | None = None,
    episodes: int = 20,
    seed: int = 0,
    rollout: Rollout | None = None,
    instructions: Mapping[str, str] | None = None,
    workers: int | None = None,
    videos: int = 0,
    out: str | pathlib.Path | None = None,
    load: Mapping[str, Any] | None = None,
    token: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run a policy in simulated episodes and count its successes.

    Episode and noise depend on seed, task and the episode's number alone: neither the number of workers nor the order
    changes a result, on one kind of machine. A served policy has a noise of its own.

    Args:
        policy: a path or "demo", see `load_policy`; the address of a server, ws://…; or a `Policy`.
        env: one of `ENVIRONMENTS`.
        tasks: by name; None: those that the policy was trained on, as its provenance says, or all if they are few.
        episodes: per task; of the first `videos` of each there is a video in the folder `out`.
        rollout: the settings of each episode; execute_steps None: what the policy recommends, or half of its chunk.
        instructions: task to the policy's instruction there, in place of the environment's.
        workers: processes, each with the policy and one thread; None: as many as the CPU's cores and the memory allow,
            1 on a GPU. 1: this process alone, the only possibility for a `Policy`. More need the usual
            `if __name__ == "__main__"` in a script.
        load: more arguments for `load_policy`.
        token: for the server of a served policy. It is in no result.
        progress: show a progress bar on stderr.
    """
    start = time.perf_counter()
    if episodes < 1 or not 0 <= videos <= episodes:
        raise SimulationError(
            f"Expected at least one episode per task, and at most as many videos, got {episodes} and {videos}."
        )
    if videos and out is None:
        raise SimulationError("Videos need a folder, out=.")
    open_policy: Callable[[], Actor] = partial(open_actor, policy, load or {}, token=token)
    actor = open_policy()
    rollout, tasks = checked_rollout(actor, env, rollout or Rollout()), chosen_tasks(actor, env, tasks)
    jobs = _jobs(env, tasks, episodes, seed, instructions or {}, pathlib.Path(out or ""), videos)
    workers = min(len(jobs), _num_workers(policy, actor, workers, len(jobs)))
    if workers > 1:  # each worker has its own; this one's memory or connection is not needed
        close_actor(actor)
    else:
        open_policy = partial(open_actor, actor, {})
    del actor
    outcomes = _run(partial(_Evaluator, open_policy, env, seed, rollout), jobs, workers, progress)
    name = str(policy) if isinstance(policy, str | pathlib.Path) else type(policy).__name__
    return _summary(name, env, seed, rollout, jobs, outcomes, workers, time.perf_counter() - start)


def _jobs(
    env: str,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    instructions: Mapping[str, str],
    out: pathlib.Path,
    videos: int,
) -> list[_Job]:
    if unknown := sorted(set(instructions) - set(tasks)):
        raise UnknownKeyError(
            f"There is an instruction for {', '.join(unknown)}, which is not among the tasks {', '.join(tasks)}."
        )
    instruction_of = {**simulator(env).instructions, **instructions}
    jobs = []
    for task in tasks:
        for index in range(episodes):
            video = str(out / f"{task}_{index}.mp4") if index < videos else None
            jobs.append(_Job(task, index, environment_seed("eval", seed, task, index), instruction_of[task], video))
    return jobs


def _num_workers(policy: str | pathlib.Path | Actor, actor: Actor, workers: int | None, jobs: int) -> int:
    shareable = isinstance(policy, str | pathlib.Path)
    if workers is None:
        if not shareable or (isinstance(actor, Policy) and actor.model.device.type != "cpu"):
            return 1
        weights = sum(p.nbytes for p in actor.model.parameters()) if isinstance(actor, Policy) else 0
        return default_workers(jobs, bytes_each=2 * weights)  # while weights are read they are there twice
    if workers != 1 and not shareable:
        raise SimulationError(f"A Policy object can't be shared by {workers} processes: give its path, or workers=1.")
    return workers


def _run(
    make_work: Callable[[], Callable[[_Job], EpisodeOutcome]], jobs: Sequence[_Job], workers: int, progress: bool
) -> list[EpisodeOutcome]:
    outcomes: list[EpisodeOutcome] = []
    with progress_bar("evaluating", len(jobs), shown=progress) as advance:
        for outcome in run_jobs(make_work, jobs, workers=workers, label=str):
            outcomes.append(outcome)
            advance(f"{sum(each.success for each in outcomes) / len(outcomes):.0%} success")
    return outcomes


class _Evaluator:
    """Runs episodes in one process; keeps the policy, and the simulation of the latest task."""

    def __init__(self, open_policy: Callable[[], Actor], env: str, seed: int, rollout: Rollout) -> None:
        self._actor, self._latest = open_policy(), LatestEnvironment(env)
        self._seed, self._rollout = seed, rollout
        self._noise_shape = noise_shape(self._actor)

    def __call__(self, job: _Job) -> EpisodeOutcome:
        environment = self._latest.of(job.task)
        rollout = dataclasses.replace(self._rollout, instruction=job.instruction)
        noise = None
        if self._noise_shape is not None:
            noise = episode_noise(self._seed, job.task, job.index, self._noise_shape)
        with _one_thread(), record_video(job.video, environment, job.instruction) as callback:
            return run_episode(self._actor, environment, job.seed, rollout=rollout, noise=noise, callback=callback)

    def close(self) -> None:
        self._latest.close()
        close_actor(self._actor)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: sums depend on their number, and results must not depend on the machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(
    policy: str,
    env: str,
    seed: int,
    rollout: Rollout,
    jobs: Sequence[_Job],
    outcomes: Sequence[EpisodeOutcome],
    workers: int,
    seconds: float,
) -> Evaluation:
    episodes = tuple(
        Episode(job.task, job.index, job.seed, each.success, each.steps, len(each.chunk_ms), each.unstable, job.video)
        for job, each in zip(jobs, outcomes, strict=True)
    )
    rate, interval = success_rate(episodes)
    instructions = {job.task: job.instruction for job in jobs}
    return Evaluation(
        env=env,
        policy=policy,
        seed=seed,
        success_rate=rate,
        interval=interval,
        tasks={
            task: task_result(instruction, [episode for episode in episodes if episode.task == task])
            for task, instruction in instructions.items()
        },
        num_steps=rollout.num_steps,
        execute_steps=rollout.execute_steps,
        max_steps=rollout.max_steps or simulator(env).max_steps,
        blank_images=rollout.blank_images,
        steps_per_second=workers * sum(each.steps for each in outcomes) / sum(each.seconds for each in outcomes),
        chunk_ms=statistics.median(ms for each in outcomes for ms in each.chunk_ms),
        seconds=seconds,
        episodes=episodes,
        videos=tuple(job.video for job in jobs if job.video),
    )
