"""Success rates of a policy: closed-loop episodes in parallel processes, with results that do not depend on them."""

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
from torchpi.rates import Rate
from torchpi.samples import checked_pick
from torchpi.schema import write_json
from torchpi.sim import LatestEnvironment, simulator
from torchpi.sim.actors import checked_rollout, chosen_tasks, noise_shape, opened, provenance_of
from torchpi.sim.environment import environment_seed
from torchpi.sim.kept import evaluation_folder, read_outcome
from torchpi.sim.processes import append_to_errors, default_workers, run_jobs
from torchpi.sim.result import Episode, Evaluation, task_result
from torchpi.sim.rollout import Actor, EpisodeOutcome, Rollout, episode_noise, run_episode
from torchpi.sim.video import is_whole_video, record_video
from torchpi.ui.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class _Job:
    """An episode to run."""

    task: str
    index: int
    seed: int
    instruction: str
    video: str | None
    outcome_file: pathlib.Path | None
    """None: the outcome is not saved."""

    def __str__(self) -> str:
        return f"episode {self.index} of task {self.task} (seed {self.seed})"


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Settings of all episodes of an evaluation."""

    env: str
    seed: int
    rollout: Rollout
    instructions: Mapping[str, str]
    folder: pathlib.Path
    videos: int
    resume: bool

    def job(self, task: str, index: int) -> _Job:
        sim = simulator(self.env)
        seed = self.seed if sim.protocol.initial_states else environment_seed("eval", self.seed, task, index)
        instruction = self.instructions.get(task, sim.instructions[task])
        video = str(self.folder / f"{task}_{index}.mp4") if index < self.videos else None
        outcome_file = self.folder / "episodes" / f"{task}_{index}.json" if self.resume else None
        return _Job(task, index, seed, instruction, video, outcome_file)


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

    An episode and its noise depend only on the seed, the task and the episode's index, so that on one kind of machine
    the results depend neither on the number of workers nor on the order. A served policy draws its own noise.

    Args:
        policy: a path or "demo", see `load_policy`; the address of a server, ws://…; or a `Policy`.
        env: one of `ENVIRONMENTS`.
        tasks: names of tasks; None: those in the policy's provenance, or all if they are few.
        episodes, seed: episodes per task, seed of episodes and noise; None: as in the environment's `EvalProtocol`.
        rollout: settings of each episode; execute_steps None: the policy's recommendation, or half of its chunk.
        instructions: other instructions for the policy, by task.
        workers: processes, each with its own policy and one thread; 1: this process, required for a `Policy`. None: as
            many as the CPU's cores and the memory allow, 1 on a GPU. More need `if __name__ == "__main__"` in a script.
        videos: record the first episodes of each task as videos in the folder `out`.
        resume: save each episode's outcome in the folder `out`, and do not repeat saved episodes.
        load: further arguments of `load_policy`; token: token of the policy's server, in no result.
        progress: show a progress bar.
    """
    start, protocol, folder = time.perf_counter(), simulator(env).protocol, pathlib.Path(out or "")
    episodes, seed = protocol.episodes if episodes is None else episodes, protocol.seed if seed is None else seed
    load, instructions, rollout = load or {}, instructions or {}, rollout or Rollout()
    check_numbers(env, episodes, videos, seed, workers)
    check_folder(videos, resume, out)
    check_installed(simulator(env).package, simulator(env).extra)  # before loading a policy, which may take long
    with contextlib.ExitStack() as folder_lock, contextlib.ExitStack() as stack:
        actor = stack.enter_context(opened(policy, load, token))
        rollout, tasks = checked_rollout(actor, env, rollout), chosen_tasks(provenance_of(actor), env, tasks)
        check_instructions(instructions, tasks)
        settings = _Settings(env, seed, rollout, instructions, folder, videos, resume)
        jobs = [settings.job(task, index) for task in tasks for index in range(episodes)]
        if resume:
            folder_lock.enter_context(evaluation_folder(folder, actor, env, seed, rollout, instructions))
        outcomes = {job: outcome for job in jobs if (outcome := _saved_outcome(job)) is not None}
        workers = _num_workers(policy, actor, env, workers, len(jobs) - len(outcomes))
        make_runner = partial(_EpisodeRunner, settings, actor, {}, None)
        if workers > 1:  # each worker opens its own policy: free this one, or close its connection
            make_runner = partial(_EpisodeRunner, settings, policy, load, token)
            del actor
            stack.close()
        with append_to_errors(lambda _: _describe_saved(jobs, folder)):
            speed = _run(make_runner, jobs, outcomes, workers, progress)
    return _summarize(policy, settings, {job: outcomes[job] for job in jobs}, speed, start)


def check_instructions(instructions: Collection[str], tasks: Sequence[str]) -> None:
    """Raise an error for instructions of tasks that are not evaluated."""
    if unknown := sorted(set(instructions) - set(tasks)):
        raise UnknownKeyError(
            f"There is an instruction for {', '.join(unknown)}, which is not among the tasks {', '.join(tasks)}."
        )


def check_folder(videos: int, resume: bool, out: str | pathlib.Path | None) -> None:
    """Raise an error if videos or outcomes are to be saved and no folder is given."""
    if (videos or resume) and out is None:
        raise SimulationError(f"{'Videos' if videos else 'Saved episodes'} need a folder, out=.")


def check_numbers(env: str, episodes: int, videos: int, seed: int, workers: int | None) -> None:
    """Raise an error for a number of episodes, videos or workers, or a seed, that is out of range."""
    if episodes < 1 or not 0 <= videos <= episodes:
        raise SimulationError(
            f"Expected at least one episode per task, and at most as many videos, got {episodes} and {videos}."
        )
    if (states := simulator(env).protocol.initial_states) and episodes > states:
        raise SimulationError(f"{env} has {states} initial states per task, got {counted(episodes, 'episode')}.")
    checked_seed(seed, below=2**31)
    if workers is not None and workers < 1:
        raise SimulationError(f"workers must be at least 1, got {workers}.")


def _saved_outcome(job: _Job) -> EpisodeOutcome | None:
    """The outcome saved by an earlier call; None if it, or a requested video, is missing or incomplete."""
    if job.outcome_file is None or not job.outcome_file.exists():
        return None
    if job.video is not None and not is_whole_video(job.video):
        return None
    return read_outcome(job.outcome_file)


def _describe_saved(jobs: Sequence[_Job], folder: pathlib.Path) -> str:
    saved = sum(_saved_outcome(job) is not None for job in jobs)
    return f"{saved} of {len(jobs)} episodes are in {folder}; run the same command to continue." if saved else ""


def _num_workers(policy: str | pathlib.Path | Actor, actor: Actor, env: str, workers: int | None, jobs: int) -> int:
    """The number of processes: the requested number or the default, at most one per job."""
    is_path = isinstance(policy, str | pathlib.Path)
    if workers is None:
        if not is_path or (isinstance(actor, Policy) and actor.model.device.type != "cpu"):
            return 1
        weights = sum(p.nbytes for p in actor.model.parameters()) if isinstance(actor, Policy) else 0
        # Weights are in memory twice while they are loaded.
        return default_workers(jobs, bytes_each=2 * weights + simulator(env).memory_bytes)
    if workers != 1 and not is_path:
        raise SimulationError(f"A Policy object can't be shared by {workers} processes: give its path, or workers=1.")
    return max(1, min(workers, jobs))


def _run(
    make_runner: Callable[[], Callable[[_Job], EpisodeOutcome]],
    jobs: Sequence[_Job],
    outcomes: dict[_Job, EpisodeOutcome],
    workers: int,
    progress: bool,
) -> float:
    """Run the jobs without an outcome, add their outcomes, and return the number of steps per second."""
    remaining = [job for job in jobs if job not in outcomes]
    with progress_bar("evaluating episodes", len(remaining), shown=progress) as advance:
        for job, outcome in zip(remaining, run_jobs(make_runner, remaining, workers=workers, label=str), strict=True):
            outcomes[job] = outcome
            advance(f"{sum(each.success for each in outcomes.values()) / len(outcomes):.0%} success")
    timed = [outcomes[job] for job in remaining or jobs]
    return workers * sum(each.steps for each in timed) / sum(each.seconds for each in timed)


class _EpisodeRunner:
    """Runs episodes in one process, with one policy and the environment of the latest task."""

    def __init__(
        self, settings: _Settings, policy: str | pathlib.Path | Actor, load: Mapping[str, Any], token: str | None
    ) -> None:
        self._settings, self._latest = settings, LatestEnvironment(settings.env)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._latest.close)
        self._actor = self._stack.enter_context(opened(policy, load, token))
        self._has_initial_states = simulator(settings.env).protocol.initial_states is not None
        self._noise_shape = noise_shape(self._actor, settings.rollout.num_samples)
        self.close = self._stack.close

    def __call__(self, job: _Job) -> EpisodeOutcome:
        environment, noise = self._latest.of(job.task), None
        if self._noise_shape is not None:
            noise = episode_noise(self._settings.seed, job.task, job.index, self._noise_shape)
        with one_thread(), record_video(job.video, environment, job.instruction) as callback:
            outcome = run_episode(
                self._actor,
                environment,
                job.seed,
                episode=job.index if self._has_initial_states else None,
                instruction=job.instruction,
                rollout=self._settings.rollout,
                noise=noise,
                callback=callback,
            )
        if job.outcome_file is not None:
            write_json(job.outcome_file, dataclasses.asdict(outcome))
        return outcome


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch with one thread: rounding depends on their number, and results must not depend on the machine's."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _summarize(
    policy: str | pathlib.Path | Actor,
    settings: _Settings,
    outcomes: Mapping[_Job, EpisodeOutcome],
    steps_per_second: float,
    start: float,
) -> Evaluation:
    episodes = tuple(
        Episode(job.task, job.index, job.seed, each.success, each.steps, len(each.chunk_ms), each.unstable, job.video)
        for job, each in outcomes.items()
    )
    rate = Rate.of(sum(episode.success for episode in episodes), len(episodes))
    instructions, rollout = {job.task: job.instruction for job in outcomes}, settings.rollout
    completed_rollout = dataclasses.asdict(rollout) | {
        "max_steps": rollout.max_steps or simulator(settings.env).max_steps,
        "pick": checked_pick(rollout.pick, rollout.num_samples, rollout.num_steps),
    }
    return Evaluation(
        env=settings.env,
        policy=str(policy) if isinstance(policy, str | pathlib.Path) else type(policy).__name__,
        seed=settings.seed,
        success_rate=rate.success_rate,
        interval=rate.interval,
        tasks={
            task: task_result(instruction, [episode for episode in episodes if episode.task == task])
            for task, instruction in instructions.items()
        },
        steps_per_second=steps_per_second,
        chunk_ms=statistics.median(ms for each in outcomes.values() for ms in each.chunk_ms),
        seconds=time.perf_counter() - start,
        episodes=episodes,
        videos=tuple(job.video for job in outcomes if job.video),
        **completed_rollout,
    )
