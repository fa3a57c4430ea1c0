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
from torchpi.sim.result import Episode, Evaluation, success_rate, task_result
from torchpi.sim.rollout import Actor, EpisodeOutcome, Rollout, episode_noise, run_episode
from torchpi.sim.video import film
from torchpi.sim.workers import default_workers, run_jobs
from torchpi.ui.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class _Job:
    """One episode to run."""

    task: str
    index: int
    seed: int
    instruction: str
    video: str | None


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
        episodes: per task.
        seed: of the evaluation.
        rollout: how the episodes are run; execute_steps None: what the policy recommends, or half of its chunk.
        instructions: task to what the policy is told there, in place of the environment's instruction.
        workers: processes, each with the policy and one thread; None: as many as the CPU's cores and the memory allow,
            1 on a GPU. 1: this process alone, the only possibility for a `Policy`. More than one need the usual
            `if __name__ == "__main__"` in a script.
        videos: the first so many episodes of each task are filmed.
        out: folder of the videos.
        load: more arguments for `load_policy`.
        token: of a served policy: what its server asks for. It is in no result.
        progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError, KeyError, ValueError: something is wrong with an argument, or the policy does not fit the
            environment.
        ConnectionError: there is no server at the address, or it asks for another token.
        ChildProcessError: a process was killed; the message names its episode.
        ModuleNotFoundError: the extra "sim" is not installed; the message says how.
        OpenGLError: no OpenGL that renders without a screen.
    """
    start = time.perf_counter()
    if episodes < 1 or not 0 <= videos <= episodes:
        raise SimulationError(
            f"Expected at least one episode per task, and at most as many videos, got {episodes} and {videos}."
        )
    if videos and out is None:
        raise SimulationError("videos need a folder, out=.")
    open_policy = partial(open_actor, policy, load or {}, token=token)
    actor = open_policy()
    tasks = chosen_tasks(actor, env, tasks)
    rollout = checked_rollout(actor, env, rollout or Rollout())
    jobs = _jobs(env, tasks, episodes, seed, instructions or {}, None if out is None else pathlib.Path(out), videos)
    workers = min(len(jobs), _num_workers(policy, actor, workers, len(jobs)))
    if workers > 1:  # each worker has its own; this one's memory or connection is not needed
        close_actor(actor)
        del actor
        make_work = partial(_Evaluator, open_policy, env, seed, rollout)
    else:
        make_work = partial(_Evaluator, partial(_itself, actor), env, seed, rollout)
    outcomes: dict[int, EpisodeOutcome] = {}
    with progress_bar("evaluating", len(jobs), shown=progress) as advance:
        for number, outcome in run_jobs(make_work, jobs, workers=workers, label=_label):
            outcomes[number] = outcome
            advance(f"{sum(o.success for o in outcomes.values()) / len(outcomes):.0%} success")
    ordered = [outcomes[number] for number in range(len(jobs))]
    done = tuple(_episode(job, outcome) for job, outcome in zip(jobs, ordered, strict=True))
    rate, interval = success_rate(done)
    return Evaluation(
        env=env,
        policy=str(policy) if isinstance(policy, str | pathlib.Path) else type(policy).__name__,
        seed=seed,
        success_rate=rate,
        interval=interval,
        tasks={
            task: task_result(told, [episode for episode in done if episode.task == task])
            for task, told in {job.task: job.instruction for job in jobs}.items()
        },
        num_steps=rollout.num_steps,
        execute_steps=rollout.execute_steps,
        max_steps=rollout.max_steps or simulator(env).max_steps,
        blank_images=rollout.blank_images,
        steps_per_second=workers * sum(o.steps for o in ordered) / sum(o.seconds for o in ordered),
        chunk_ms=statistics.median(ms for o in ordered for ms in o.chunk_ms),
        seconds=time.perf_counter() - start,
        episodes=done,
        videos=tuple(job.video for job in jobs if job.video),
    )


def _itself(actor: Actor) -> Actor:
    return actor


def _jobs(
    env: str,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    instructions: Mapping[str, str],
    out: pathlib.Path | None,
    videos: int,
) -> list[_Job]:
    if unknown := sorted(set(instructions) - set(tasks)):
        raise UnknownKeyError(
            f"There is an instruction for {', '.join(unknown)}, which is not among the tasks {', '.join(tasks)}."
        )
    own = simulator(env).instructions
    return [
        _Job(
            task,
            index,
            environment_seed("eval", seed, task, index),
            instructions.get(task, own[task]),
            str(out / f"{task}_{index}.mp4") if out is not None and index < videos else None,
        )
        for task in tasks
        for index in range(episodes)
    ]


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


def _label(job: _Job) -> str:
    return f"episode {job.index} of {job.task} (seed {job.seed})"


class _Evaluator:
    """Runs episodes in one process; keeps the policy, and the simulation of the latest task."""

    def __init__(self, open_actor: Callable[[], Actor], env: str, seed: int, rollout: Rollout) -> None:
        self._actor, self._latest = open_actor(), LatestEnvironment(env)
        self._seed, self._rollout = seed, rollout
        self._noise_shape = noise_shape(self._actor)

    def __call__(self, job: _Job) -> EpisodeOutcome:
        """Run one episode."""
        environment = self._latest.of(job.task)
        rollout = dataclasses.replace(self._rollout, instruction=job.instruction)
        noise = None
        if self._noise_shape is not None:
            noise = episode_noise(self._seed, job.task, job.index, self._noise_shape)
        with _one_thread(), film(job.video, environment, job.instruction) as onlooker:
            return run_episode(self._actor, environment, job.seed, rollout=rollout, noise=noise, onlooker=onlooker)

    def close(self) -> None:
        """Free simulation and connection."""
        self._latest.close()
        close_actor(self._actor)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads: with one, a result does not depend on where it is computed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _episode(job: _Job, outcome: EpisodeOutcome) -> Episode:
    return Episode(
        job.task,
        job.index,
        job.seed,
        outcome.success,
        outcome.steps,
        len(outcome.chunk_ms),
        unstable=outcome.unstable,
        video=job.video,
    )
