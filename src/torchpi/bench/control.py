"""What real-time chunking is worth: a simulated robot, a policy whose answers take their time, and every way to go from
one chunk to the next.

The control loop is torchpi-client's, with a clock that moves from step to step. The policy really infers, in this
process, but its time does not count: its answer arrives exactly so many steps after it was asked.
"""

import copy
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from torchpi.policy import MAX_GIVEN, Policy, load_policy
from torchpi.sim import LatestEnvironment, check_tasks
from torchpi.sim.actors import checked_rollout, noise_shape
from torchpi.sim.environment import Environment, UnstableError, environment_seed
from torchpi.sim.progress import progress_bar
from torchpi.sim.result import wilson_interval
from torchpi.sim.rollout import Rollout, episode_noise
from torchpi.sim.workers import default_workers, run_jobs
from torchpi.training.curves import TEXT_RGB, style_axes
from torchpi.types import ActionPrefix
from torchpi_client import ControlLoop, ControlSettings
from torchpi_client.inference import Answer
from torchpi_client.protocol import RTC
from torchpi_client.protocol import ActionPrefix as SentPrefix
from torchpi_client.report import ControlReport
from torchpi_client.schedule import ActionQueue, Ensemble, Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_SECONDS = 0.05
"""A control step on the virtual clock; delays are whole steps, so that its length changes no result."""

TRAINED = "rtc-trained"
MODES: dict[str, tuple[str, Literal["trained", "guidance"] | None]] = {
    "sync": ("sync", None),
    "async": ("async", None),
    "ensemble": ("ensemble", None),
    "rtc": ("rtc", "guidance"),
    TRAINED: ("rtc", "trained"),
}
"""What is compared: the control loop's mode, and how the policy goes on from the old chunk (`ActionPrefix.how`)."""

_COLORS = dict(zip(MODES, ("#8e96a3", "#2f66d0", "#b7357f", "#cf5a1e", "#0d8577"), strict=True))


# ---- what comes out ----


@dataclasses.dataclass(frozen=True)
class Differences:
    """Between two actions, in parts of each dimension's range (1 % to 99 % of the training data's).

    Mean and percentile are those of each episode, averaged over the episodes: otherwise those that fail, which are many
    times longer, would decide.
    """

    count: int
    mean: float | None
    """Of the mean over the dimensions; None: there are none."""
    p95: float | None
    """The 95th percentile of that mean."""
    dimension_means: dict[str, float]
    """Per dimension of the action; without those that have no range."""
    dimension_p95s: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ControlResult:
    """One mode at one delay, over all episodes."""

    mode: str
    delay: int
    """Control steps from an observation to its chunk."""
    episodes: int
    success_rate: float
    """0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of it."""
    steps_to_success: float | None
    """Mean of the successful episodes, steps in which the robot was held included; None: there are none."""
    jumps: Differences
    """At chunk borders: from the action that would have been executed at this step without the new chunk, to the one
    that was. Where the old chunk has no action for it, there is none."""
    changes_at_borders: Differences
    """From one command to the next where they are not of the same chunk, or the robot stops or starts."""
    changes_inside: Differences
    """From one command to the next of the same chunk."""
    steps: int
    """Commands in all episodes."""
    chunks: int
    waits: int
    """Steps without an action where none was expected: before the first chunk, and between chunks in "sync"."""
    holds: int
    """Steps in which the robot was held because a chunk was late."""
    late_chunks: int
    stopped: int
    """Episodes that the control loop ended."""


@dataclasses.dataclass(frozen=True)
class ControlBenchmark:
    """The result of `bench_control`."""

    policy: str
    env: str
    tasks: tuple[str, ...]
    episodes: int
    """Per task; the same for each mode and delay."""
    seed: int
    action_horizon: int
    execute_steps: int | None
    """Before the next chunk is asked for, except in "ensemble"; None: half of the chunk."""
    late: str
    """What the loop does when the actions run out before the next chunk is there."""
    results: tuple[ControlResult, ...]
    left_out: tuple[str, ...]
    """What the policy can't do, in words."""
    seconds: float
    """The whole benchmark on the clock."""


# ---- one episode ----


class VirtualClock:
    """Moves to the moment that is waited for."""

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        """Seconds since the beginning."""
        return self._time

    def sleep_until(self, moment: float) -> None:
        """It is then."""
        self._time = max(self._time, moment)


class DelayedPolicy:
    """A policy for the control loop, and its inference: an answer arrives a number of steps after the question."""

    def __init__(
        self,
        policy: Policy,
        clock: VirtualClock,
        *,
        delay: int,
        noise: Callable[[int], np.ndarray],
        how: Literal["trained", "guidance"] | None = None,
    ) -> None:
        """A policy behind a delay.

        Args:
            delay: in control steps.
            noise: the number of a chunk to the noise [H, action_dim] that it begins from.
            how: it goes on from the old chunk, see `ActionPrefix.how`.
        """
        self._policy, self._clock, self._delay, self._noise, self._how = policy, clock, delay, noise, how
        self.metadata = {**policy.metadata, RTC: True}
        self._chunks = 0
        self._answer: Answer | None = None

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """A chunk that goes on from the rest that the loop sent along, where it did."""
        observation = dict(observation)
        sent = SentPrefix.from_wire(observation.pop(RTC)) if RTC in observation else None
        prefix = ActionPrefix(sent.actions, sent.delay, sent.execution_horizon, self._how) if sent else None
        noise = self._noise(self._chunks)
        self._chunks += 1
        return dict(self._policy.infer_batch([observation], noise=noise[None], prefixes=[prefix])[0])

    @property
    def busy(self) -> bool:
        """Whether there is a request whose answer was not taken yet."""
        return self._answer is not None

    def start(self, observation: dict[str, Any]) -> None:
        """Infer; the answer is kept until its time comes."""
        arrival = self._clock.now() + self._delay * STEP_SECONDS
        self._answer = Answer(self.infer(observation), None, arrival)

    def poll(self) -> Answer | None:
        """Take the answer; None: it is not there yet."""
        if self._answer is None or self._answer.finished > self._clock.now() + STEP_SECONDS / 1000:
            return None
        answer, self._answer = self._answer, None
        return answer

    def wait(self) -> Answer:
        """Take the answer when it is there. The loop waits for its warm-up alone, whose chunks do not count."""
        assert self._answer is not None
        self._clock.sleep_until(self._answer.finished)
        answer, self._answer, self._chunks = self._answer, None, 0
        return answer


class SimulatedRobot:
    """A robot of the control loop that is an environment; each command is one of its steps."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.steps, self.success, self.unstable = 0, False, False

    @property
    def over(self) -> bool:
        """The task is done, or the steps are used up, or the simulation has broken."""
        return self.success or self.unstable or self.steps == self._environment.max_steps

    def observe(self) -> dict[str, Any]:
        """The environment's observation now."""
        return self._environment.observe()

    def act(self, action: np.ndarray) -> None:
        """One step; none after the episode is over (the loop ends with a command that holds the robot)."""
        if self.over:
            return
        try:
            self.success = self._environment.step(action)
        except UnstableError:
            self.unstable = True
        self.steps += 1


class _WatchedSchedule:
    """The loop's schedule, with notes of how it goes from chunk to chunk."""

    def __init__(self, schedule: ActionQueue | Ensemble) -> None:
        self._schedule = schedule
        self._chunk, self._start = np.empty((0, 0), np.float32), 0  # the latest
        self._expected: np.ndarray | None = None
        self.chunks = 0
        self.executed = 0
        self.jumps: list[np.ndarray] = []

    @property
    def due(self) -> bool:
        return self._schedule.due

    def request(self) -> Request:
        return self._schedule.request()

    def arrive(self, request: Request, chunk: np.ndarray) -> int | None:
        expected = self._without_new_chunk()
        discarded = self._schedule.arrive(request, chunk)
        if discarded is not None:
            self._expected, self._chunk, self._start = expected, chunk, request.start
            self.chunks += 1
        return discarded

    def next(self) -> np.ndarray | None:
        action = self._schedule.next()
        if action is not None:
            if self._expected is not None:
                self.jumps.append(action - self._expected)
            self._expected = None
            self.executed += 1
        return action

    def _without_new_chunk(self) -> np.ndarray | None:
        """What the chunks up to now say for the next step."""
        if isinstance(self._schedule, Ensemble):
            return copy.deepcopy(self._schedule).next()
        place = self.executed - self._start  # "sync" would not execute it, but it is there
        return self._chunk[place] if place < len(self._chunk) else None


class _WatchedLoop(ControlLoop):
    """The control loop, with notes of its commands; it ends with the episode."""

    def __init__(self, robot: SimulatedRobot, *arguments: Any, **options: Any) -> None:
        super().__init__(robot, *arguments, **options)
        self._simulated = robot
        self.commands: list[tuple[np.ndarray, int | None]] = []
        """Each with the number of its chunk; None: the robot was held."""

    def _make_schedule(self, chunk: np.ndarray) -> Any:
        self.watched = _WatchedSchedule(super()._make_schedule(chunk))
        return self.watched

    def _ask(self) -> None:
        super()._ask()
        self._receive()  # an answer without delay is there in the same step; real ones never are

    def _next_command(self) -> np.ndarray | None:
        executed = self.watched.executed
        command = super()._next_command()
        if command is not None:
            self.commands.append((command, self.watched.chunks if self.watched.executed > executed else None))
        return command

    def _act(self, command: np.ndarray) -> None:
        super()._act(command)
        if self._simulated.over:
            self.stop()


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How an episode went; differences are in the robot's units, absolute."""

    success: bool
    steps: int
    report: ControlReport
    jumps: Float[np.ndarray, "_ a"]
    changes_at_borders: Float[np.ndarray, "_ a"]
    changes_inside: Float[np.ndarray, "_ a"]


def _changes(commands: Sequence[tuple[np.ndarray, int | None]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """From command to command: at borders, and inside of chunks. While the robot is held, there are none."""
    borders: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    for (before, old), (after, new) in itertools.pairwise(commands):
        if old is not None or new is not None:
            (inside if old == new else borders).append(after - before)
    return borders, inside


@dataclasses.dataclass(frozen=True)
class _Job:
    """One episode to run."""

    mode: str
    delay: int
    task: str
    index: int


def _label(job: _Job) -> str:
    return f"episode {job.index} of {job.task}, {job.mode} at delay {job.delay}"


class _Episodes:
    """Runs episodes in one process and one thread; keeps the policy, and the simulation of the latest task."""

    def __init__(self, policy: str | Policy, env: str, seed: int, execute_steps: int | None, late: str) -> None:
        self._policy = load_policy(policy, device="cpu") if isinstance(policy, str) else policy
        self._latest = LatestEnvironment(env)
        self._seed, self._execute_steps, self._late = seed, execute_steps, late
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on the number of threads

    def __call__(self, job: _Job) -> _Outcome:
        """Run one episode."""
        environment = self._latest.of(job.task)
        environment.reset(environment_seed("eval", self._seed, job.task, job.index))
        mode, how = MODES[job.mode]
        clock = VirtualClock()
        noise = episode_noise(self._seed, job.task, job.index, _noise_shape(self._policy))
        policy = DelayedPolicy(self._policy, clock, delay=job.delay, noise=noise, how=how)
        settings = ControlSettings(
            mode=mode,
            execute_steps=None if mode == "ensemble" else self._execute_steps,
            control_hz=1 / STEP_SECONDS,
            resample="as_is",
            late=self._late,
        )
        robot = SimulatedRobot(environment)
        loop = _WatchedLoop(robot, policy, settings, clock=clock, inference=policy)
        report = loop.run()
        size = environment.embodiment.action_size
        found = (loop.watched.jumps, *_changes(loop.commands))
        return _Outcome(
            robot.success, robot.steps, report, *(np.abs(np.reshape(rows, (-1, size))).astype(float) for rows in found)
        )

    def close(self) -> None:
        """Free the simulation."""
        torch.set_num_threads(self._threads)
        self._latest.close()


def _noise_shape(policy: Policy) -> tuple[int, int]:
    shape = noise_shape(policy)
    assert shape is not None
    return shape


# ---- all of them ----


def bench_control(
    policy: str | Policy,
    *,
    env: str = "metaworld",
    tasks: Sequence[str],
    episodes: int,
    delays: Sequence[int] = (0, 1, 2, 4, 8),
    modes: Sequence[str] | None = None,
    seed: int = 0,
    execute_steps: int | None = None,
    late: Literal["hold", "stop"] = "hold",
    workers: int | None = None,
    progress: bool = True,
) -> ControlBenchmark:
    """Run the same episodes in each mode at each delay.

    Args:
        policy: a path or "demo", see `load_policy`; or a `Policy`, with one worker.
        env: one of `ENVIRONMENTS`, whose robot the policy is for.
        tasks: by name.
        episodes: per task, mode and delay.
        delays: in control steps.
        modes: of `MODES`; None: all that the policy can do.
        seed: of episodes and noise; the episodes are those of `evaluate`.
        execute_steps: of a chunk, before the next is asked for; None: what the policy recommends, or half of its chunk.
            In "ensemble" always 1.
        late: "hold" or "stop", see `ControlSettings`: what happens where d > H − s. ("slow" begins when a chunk takes
            longer than those before, which does not happen here.)
        workers: processes, each with one thread; None: as many as the CPU's cores and the memory allow, or 1 for a
            `Policy`.
        progress: show a progress bar on stderr.

    Raises:
        KeyError: there is no such environment or task.
        ValueError: an argument is out of range, the policy is for another robot, or can't do what is asked.
        What `load_policy` and `make_environment` raise.
    """
    start = time.perf_counter()
    loaded = load_policy(policy, device="cpu") if isinstance(policy, str) else policy
    check_tasks(env, tasks)
    max_given = int(loaded.metadata.get(MAX_GIVEN, 0))
    modes = list(modes) if modes is not None else [mode for mode in MODES if mode != TRAINED or max_given]
    _check(modes, delays, episodes, max_given)
    rollout = checked_rollout(loaded, env, Rollout(execute_steps=execute_steps))
    runs = [(mode, delay) for mode in modes for delay in delays if mode != TRAINED or delay <= max_given]
    jobs = [_Job(*run, task, index) for task in tasks for run in runs for index in range(episodes)]
    workers = _num_workers(policy, loaded, workers, len(jobs))
    make_work = partial(_Episodes, policy if workers > 1 else loaded, env, seed, rollout.execute_steps, late)
    outcomes: dict[tuple[str, int], list[_Outcome]] = {run: [] for run in runs}
    with progress_bar("episodes", len(jobs), shown=progress) as advance:
        for number, outcome in run_jobs(make_work, jobs, workers=workers, label=_label):
            outcomes[jobs[number].mode, jobs[number].delay].append(outcome)
            advance(f"{jobs[number].mode} at delay {jobs[number].delay}")
    too_long = [str(delay) for delay in delays if delay > max_given]
    return ControlBenchmark(
        policy=policy if isinstance(policy, str) else type(policy).__name__,
        env=env,
        tasks=tuple(tasks),
        episodes=episodes,
        seed=seed,
        action_horizon=loaded.model.config.require("action_horizon"),
        execute_steps=rollout.execute_steps,
        late=late,
        results=tuple(_result(*run, found, loaded) for run, found in outcomes.items()),
        left_out=(f"{TRAINED} at delays {', '.join(too_long)}: trained for at most {max_given}",)
        if too_long and TRAINED in modes
        else (),
        seconds=time.perf_counter() - start,
    )


def _check(modes: Sequence[str], delays: Sequence[int], episodes: int, max_given: int) -> None:
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"there is no mode {', '.join(unknown)}; there are {', '.join(MODES)}")
    if not modes or len(set(modes)) < len(modes):
        raise ValueError(f"expected at least one mode, each once, got {', '.join(modes) or 'none'}")
    if not delays or min(delays) < 0 or len(set(delays)) < len(delays):
        raise ValueError(f"expected delays of 0 or more steps, each once, got {', '.join(map(str, delays)) or 'none'}")
    if episodes < 1:
        raise ValueError(f"expected at least one episode per task, got {episodes}")
    if TRAINED in modes and not max_given:
        raise ValueError(
            f"mode {TRAINED} needs a policy that was trained to go on from given actions (max_given of a training); "
            f"this one's metadata have no {MAX_GIVEN}. Use rtc"
        )


def _num_workers(policy: str | Policy, loaded: Policy, workers: int | None, jobs: int) -> int:
    if not isinstance(policy, str):
        if workers not in (None, 1):
            raise ValueError(f"a Policy object can't be shared by {workers} processes: give its path, or workers=1")
        return 1
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return default_workers(jobs, bytes_each=2 * weights) if workers is None else workers


def _result(mode: str, delay: int, outcomes: Sequence[_Outcome], policy: Policy) -> ControlResult:
    successes = [outcome.steps for outcome in outcomes if outcome.success]
    reports = [outcome.report for outcome in outcomes]
    return ControlResult(
        mode=mode,
        delay=delay,
        episodes=len(outcomes),
        success_rate=len(successes) / len(outcomes),
        interval=wilson_interval(len(successes), len(outcomes)),
        steps_to_success=float(np.mean(successes)) if successes else None,
        jumps=_differences([outcome.jumps for outcome in outcomes], policy),
        changes_at_borders=_differences([outcome.changes_at_borders for outcome in outcomes], policy),
        changes_inside=_differences([outcome.changes_inside for outcome in outcomes], policy),
        steps=sum(outcome.steps for outcome in outcomes),
        chunks=sum(report.chunks for report in reports),
        waits=sum(report.waits for report in reports),
        holds=sum(report.holds for report in reports),
        late_chunks=sum(report.late_chunks for report in reports),
        stopped=sum(report.stopped is not None for report in reports),
    )


def _differences(found: Sequence[Float[np.ndarray, "_ a"]], policy: Policy) -> Differences:
    bounds = policy.metadata["action_range"]
    ranges = np.array(bounds["high"]) - np.array(bounds["low"])
    used = ranges > 0
    names = [name for name, is_used in zip(policy.metadata["action_names"], used, strict=True) if is_used]
    count = sum(map(len, found))
    if not count or not names:
        return Differences(count, None, None, {}, {})
    episodes = [rows[:, used] / ranges[used] for rows in found if len(rows)]
    return Differences(
        count=count,
        mean=float(np.mean([rows.mean() for rows in episodes])),
        p95=float(np.mean([np.quantile(rows.mean(axis=1), 0.95) for rows in episodes])),
        dimension_means=_named(names, [rows.mean(axis=0) for rows in episodes]),
        dimension_p95s=_named(names, [np.quantile(rows, 0.95, axis=0) for rows in episodes]),
    )


def _named(names: Sequence[str], episodes: Sequence[Float[np.ndarray, " a"]]) -> dict[str, float]:
    """Per dimension, the mean of the episodes."""
    return dict(zip(names, np.mean(episodes, axis=0).tolist(), strict=True))


# ---- showing it ----


def plot_control(benchmark: ControlBenchmark) -> "Figure":
    """Over the delay, a line per mode: success with its interval, what happens at chunk borders, steps to success."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    success, jumps, changes, steps = figure.subplots(1, 4)
    modes = list(dict.fromkeys(result.mode for result in benchmark.results))
    for place, mode in enumerate(modes):
        found = [result for result in benchmark.results if result.mode == mode]
        # Side by side, because the modes' intervals would hide each other.
        delays = np.array([result.delay for result in found]) + 0.12 * (place - (len(modes) - 1) / 2)
        rates = np.array([result.success_rate for result in found])
        low, high = np.array([result.interval for result in found]).T
        line: dict[str, Any] = {"color": _COLORS[mode], "marker": "o", "markersize": 4, "linewidth": 1.6}
        success.errorbar(delays, rates, [rates - low, high - rates], label=mode, elinewidth=1, capsize=2, **line)
        # Where most old chunks have ended before the new ones begin, the few others do not stand for them.
        _draw(jumps, delays, [r.jumps.mean if r.jumps.count > r.chunks / 2 else None for r in found], **line)
        _draw(changes, delays, [result.changes_at_borders.mean for result in found], **line)
        _draw(steps, delays, [result.steps_to_success for result in found], **line)
    for axes, title, unit in (
        (success, "Success rate", "share, 95 % interval"),
        (jumps, "Jump between the chunks", "mean / action range"),
        (changes, "Change of command at borders", "mean / action range"),
        (steps, "Steps to success", "mean, control steps"),
    ):
        axes.set_title(title, fontsize=11, loc="left")
        style_axes(axes, x="delay, control steps", y=unit)
        axes.set_xticks(sorted({result.delay for result in benchmark.results}))
        axes.set_ylim(bottom=0)
    success.set_ylim(0, 1.05)
    figure.legend(loc="outside lower center", ncols=len(modes), frameon=False, labelcolor=TEXT_RGB)
    figure.suptitle(
        f"{benchmark.policy}: {', '.join(benchmark.tasks)}, episodes of each: {benchmark.episodes}",
        fontsize=11,
        color=TEXT_RGB,
    )
    return figure


def _draw(axes: "Axes", delays: np.ndarray, values: Sequence[float | None], **style: Any) -> None:
    axes.plot(delays, np.array(values, float), **style)  # a gap where there is none


def _print_table(benchmark: ControlBenchmark, console: Console) -> None:
    execute = benchmark.execute_steps or "half of it"
    console.print(
        f"{benchmark.policy} in {benchmark.env}: {', '.join(benchmark.tasks)}, {benchmark.episodes} episodes each; "
        f"chunks of {benchmark.action_horizon}, asked for after {execute}; late: {benchmark.late}"
    )
    # 80 characters wide, which is what a log has.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    columns = ("mode", "delay", "success", "interval", "steps", "jump", "p95", "border", "inside", "held", "late")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for result in benchmark.results:
        low, high = (round(100 * end) for end in result.interval)
        table.add_row(
            result.mode,
            str(result.delay),
            f"{result.success_rate:.0%}",
            f"{low}–{high}%",
            _number(result.steps_to_success, ".0f"),
            _number(result.jumps.mean, ".3f"),
            _number(result.jumps.p95, ".3f"),
            _number(result.changes_at_borders.mean, ".3f"),
            _number(result.changes_inside.mean, ".3f"),
            f"{(result.waits + result.holds) / result.episodes:.0f}",
            f"{result.late_chunks / result.episodes:.1f}",
        )
    console.print(table)
    console.print(
        "steps: to success. jump: at chunk borders, from what the old chunk says for the step to what is executed. "
        "border, inside: from command to command there, and inside of chunks. All these in parts of the action range. "
        "Per episode, held: steps without an action; late: chunks before which the actions ran out."
    )
    for line in benchmark.left_out:
        console.print(f"left out: {line}")
    console.print(f"{benchmark.seconds:.0f} s")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def run_bench_control(policy: str, *, out: pathlib.Path | None, as_json: bool, **options: Any) -> None:
    """Run, print the table, and write control.json and control.png into a folder.

    Args:
        out: the folder; None: nothing is written.
        as_json: one JSON document on stdout, the table on stderr.
        options: of `bench_control`.
    """
    benchmark = bench_control(policy, **options)
    _print_table(benchmark, Console(stderr=as_json, highlight=False))
    document = json.dumps(dataclasses.asdict(benchmark))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "control.json").write_text(document + "\n", encoding="utf-8")
        plot_control(benchmark).savefig(out / "control.png", dpi=110)
    if as_json:
        print(document)
