"""Success rates: many closed-loop episodes in parallel processes, the same for any number of them."""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchpi.errors import SimulationError, UnknownKeyError, counted
from torchpi.extras import check_installed
from torchpi.policy import Policy
from torchpi.randomness import checked_seed
from torchpi.samples import checked_pick
from torchpi.schema import write_json
from torchpi.sim import LatestEnvironment, simulator
from torchpi.sim.actors import checked_rollout, chosen_tasks, noise_shape, opened, provenance_of
from torchpi.sim.environment import environment_seed
from torchpi.sim.kept import read_outcome, resumable
from torchpi.sim.processes import default_workers, explaining, run_jobs
from torchpi.sim.result import Episode, Evaluation, success_rate, task_result
from torchpi.sim.rollout import Actor, EpisodeOutcome, Rollout, episode_noise, run_episode
from torchpi.sim.video import is_whole_video, record_video
from torchpi.ui.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class _Job:
    task: str
    index: int
    seed: int
    instruction: str
    video: str | None
    kept: pathlib.Path | None
    """File of its outcome; None: it is not kept."""

    def __str__(self) -> str:
        return f"episode {self.index} of task {self.task} (seed {self.seed})"


def evaluate(
    policy: str | pathlib.Path | Actor,
    env: str,
    *,
    tasks: Sequence[str] | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    rollout: Rollout | None = None,
    instructions: Mapping[str, str] | None = None,
    workers: int | None = None,
    videos: int = 0,
    out: str | pathlib.Path | None = None,
    resume: bool = False,
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
        seed: of episodes and noise. Its default, and that of `episodes`, is in the environment's `EvalProtocol`.
        rollout: the settings of each episode; execute_steps None: what the policy recommends, or half of its chunk.
        instructions: task to the policy's instruction there, in place of the environment's.
        workers: processes, each with the policy and one thread; None: as many as the CPU's cores and the memory allow,
            1 on a GPU. 1: this process alone, the only possibility for a `Policy`. More need the usual
            `if __name__ == "__main__"` in a script.
        resume: keep each episode in the folder `out` as it ends, and take those that are there as they are.
        load: more arguments for `load_policy`; token: of a served policy's server, in no result; progress: show a bar.
    """
    start, protocol = time.perf_counter(), simulator(env).protocol
    episodes, seed = protocol.episodes if episodes is None else episodes, protocol.seed if seed is None else seed
    load, instructions, rollout = load or {}, instructions or {}, rollout or Rollout()
    check_numbers(env, episodes, videos, seed, workers)
    check_folder(videos, resume, out)
    check_installed(simulator(env).package, simulator(env).extra)  # loading a policy may take long
    with contextlib.ExitStack() as kept_in, contextlib.ExitStack() as stack:
        actor = stack.enter_context(opened(policy, load, token))
        rollout, tasks = checked_rollout(actor, env, rollout), chosen_tasks(provenance_of(actor), env, tasks)
        check_instructions(instructions, tasks)
        folder = pathlib.Path(out or "")
        jobs = _jobs(env, tasks, episodes, seed, instructions, folder, videos, resume)
        if resume:
            kept_in.enter_context(resumable(folder, actor, env, seed, rollout, instructions))
        done = {job: outcome for job in jobs if (outcome := _kept(job))}
        workers = _num_workers(policy, actor, env, workers, len(jobs) - len(done))
        make_work = partial(_Evaluator, actor, {}, None, env, seed, rollout)
        if workers > 1:  # each worker has its own; this one's memory or connection is not needed
            make_work = partial(_Evaluator, policy, load, token, env, seed, rollout)
            del actor
            stack.close()
        with explaining(partial(_describe_kept, jobs, folder)):
            speed = _run(make_work, jobs, done, workers, progress)
    return _summary(policy, env, seed, rollout, {job: done[job] for job in jobs}, speed, time.perf_counter() - start)


def _jobs(
    env: str,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    instructions: Mapping[str, str],
    out: pathlib.Path,
    videos: int,
    resume: bool,
) -> list[_Job]:
    place = simulator(env)
    instruction_of = {**place.instructions, **instructions}
    jobs = []
    for task in tasks:
        for index in range(episodes):
            video = str(out / f"{task}_{index}.mp4") if index < videos else None
            own = seed if place.protocol.initial_states else environment_seed("eval", seed, task, index)
            kept = out / "episodes" / f"{task}_{index}.json" if resume else None
            jobs.append(_Job(task, index, own, instruction_of[task], video, kept))
    return jobs


def check_instructions(instructions: Collection[str], tasks: Sequence[str]) -> None:
    """Raise an error for instructions of tasks that are not evaluated."""
    if unknown := sorted(set(instructions) - set(tasks)):
        raise UnknownKeyError(
            f"There is an instruction for {', '.join(unknown)}, which is not among the tasks {', '.join(tasks)}."
        )


def check_folder(videos: int, resume: bool, out: str | pathlib.Path | None) -> None:
    """Raise an error where there is no folder for videos or kept episodes."""
    if (videos or resume) and out is None:
        raise SimulationError(f"{'Videos' if videos else 'Kept episodes'} need a folder, out=.")


def check_numbers(env: str, episodes: int, videos: int, seed: int, workers: int | None) -> None:
    """Raise an error for numbers of episodes per task, and of their videos, that an environment does not have, for a
    seed that its generator does not take, and for no workers."""
    if episodes < 1 or not 0 <= videos <= episodes:
        raise SimulationError(
            f"Expected at least one episode per task, and at most as many videos, got {episodes} and {videos}."
        )
    if (states := simulator(env).protocol.initial_states) and episodes > states:
        raise SimulationError(f"{env} has {states} initial states per task, got {counted(episodes, 'episode')}.")
    checked_seed(seed, below=2**31)
    if workers is not None and workers < 1:
        raise SimulationError(f"workers must be at least 1, got {workers}.")


def _describe_kept(jobs: Sequence[_Job], folder: pathlib.Path, _: BaseException) -> str:
    kept = sum(_kept(job) is not None for job in jobs)
    return f"{kept} of {len(jobs)} episodes are in {folder}; the same command goes on from there." if kept else ""


def _kept(job: _Job) -> EpisodeOutcome | None:
    """Its outcome, if it has ended before, and with the video that is asked for."""
    if job.kept is None or not job.kept.exists() or (job.video is not None and not is_whole_video(job.video)):
        return None
    return read_outcome(job.kept)


def _num_workers(policy: str | pathlib.Path | Actor, actor: Actor, env: str, workers: int | None, jobs: int) -> int:
    """The number of processes, of those that are asked for as many as there are jobs."""
    shareable = isinstance(policy, str | pathlib.Path)
    if workers is None:
        if not shareable or (isinstance(actor, Policy) and actor.model.device.type != "cpu"):
            return 1
        weights = sum(p.nbytes for p in actor.model.parameters()) if isinstance(actor, Policy) else 0
        # While weights are read they are there twice.
        return default_workers(jobs, bytes_each=2 * weights + simulator(env).memory_bytes)
    if workers != 1 and not shareable:
        raise SimulationError(f"A Policy object can't be shared by {workers} processes: give its path, or workers=1.")
    return max(1, min(workers, jobs))


def _run(
    make_work: Callable[[], Callable[[_Job], EpisodeOutcome]],
    jobs: Sequence[_Job],
    done: dict[_Job, EpisodeOutcome],
    workers: int,
    progress: bool,
) -> float:
    """Run the jobs that are not done yet, and add their outcomes to those that are; the steps per second."""
    rest = [job for job in jobs if job not in done]
    with progress_bar("evaluating episodes", len(rest), shown=progress) as advance:
        for job, outcome in zip(rest, run_jobs(make_work, rest, workers=workers, label=str), strict=True):
            done[job] = outcome
            advance(f"{sum(each.success for each in done.values()) / len(done):.0%} success")
    run = [done[job] for job in rest or jobs]
    return workers * sum(each.steps for each in run) / sum(each.seconds for each in run)


class _Evaluator:
    """Runs episodes in one process; keeps the policy, and the simulation of the latest task."""

    def __init__(
        self,
        policy: str | pathlib.Path | Actor,
        load: Mapping[str, Any],
        token: str | None,
        env: str,
        seed: int,
        rollout: Rollout,
    ) -> None:
        self._stack, self._latest = contextlib.ExitStack(), LatestEnvironment(env)
        self._stack.callback(self._latest.close)
        self._actor = self._stack.enter_context(opened(policy, load, token))
        self._seed, self._rollout = seed, rollout
        self._has_states = simulator(env).protocol.initial_states is not None
        self._noise_shape = noise_shape(self._actor, rollout.num_samples)
        self.close = self._stack.close

    def __call__(self, job: _Job) -> EpisodeOutcome:
        environment, noise = self._latest.of(job.task), None
        if self._noise_shape is not None:
            noise = episode_noise(self._seed, job.task, job.index, self._noise_shape)
        with one_thread(), record_video(job.video, environment, job.instruction) as callback:
            outcome = run_episode(
                self._actor,
                environment,
                job.seed,
                episode=job.index if self._has_states else None,
                instruction=job.instruction,
                rollout=self._rollout,
                noise=noise,
                callback=callback,
            )
        if job.kept is not None:
            write_json(job.kept, dataclasses.asdict(outcome))
        return outcome


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums depend on their number, and results must not depend on the machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(
    policy: str | pathlib.Path | Actor,
    env: str,
    seed: int,
    rollout: Rollout,
    outcomes: Mapping[_Job, EpisodeOutcome],
    steps_per_second: float,
    seconds: float,
) -> Evaluation:
    episodes = tuple(
        Episode(job.task, job.index, job.seed, each.success, each.steps, len(each.chunk_ms), each.unstable, job.video)
        for job, each in outcomes.items()
    )
    rate, interval = success_rate(episodes)
    instructions, settings = {job.task: job.instruction for job in outcomes}, dataclasses.asdict(rollout)
    settings["max_steps"] = rollout.max_steps or simulator(env).max_steps
    settings["pick"] = checked_pick(rollout.pick, rollout.num_samples, rollout.num_steps)
    return Evaluation(
        env=env,
        policy=str(policy) if isinstance(policy, str | pathlib.Path) else type(policy).__name__,
        seed=seed,
        success_rate=rate,
        interval=interval,
        tasks={
            task: task_result(instruction, [episode for episode in episodes if episode.task == task])
            for task, instruction in instructions.items()
        },
        steps_per_second=steps_per_second,
        chunk_ms=statistics.median(ms for each in outcomes.values() for ms in each.chunk_ms),
        seconds=seconds,
        episodes=episodes,
        videos=tuple(job.video for job in outcomes if job.video),
        **settings,
    )
