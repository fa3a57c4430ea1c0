"""Effect of real-time chunking: a simulated robot whose chunks arrive late, in each control mode.

    python benchmarks/control.py --out control

The same episodes run in each mode at each delay. A table shows success rates, jumps between consecutive chunks, and how
long the robot was held. The control loop is torchpi-client's, with a virtual clock that advances by steps. The policy
runs in this process, but its inference time does not count: its answer arrives exactly the given number of steps after
the request.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from control_episodes import MODES, TRAINED, Episodes, Job, Outcome
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from torchpi.checkpoints.spec import MAX_ACTION_PREFIX
from torchpi.errors import UsageError
from torchpi.policy import Policy, load_policy
from torchpi.rates import wilson_interval
from torchpi.sim import check_tasks
from torchpi.sim.actors import checked_rollout
from torchpi.sim.processes import default_workers, run_jobs
from torchpi.sim.rollout import Rollout
from torchpi.ui.palette import COLORS
from torchpi.ui.plots import draw_figure, label_axes, save_figure
from torchpi.ui.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = dict(zip(MODES, ("noise", "prefix", "time", "suffix", "vision"), strict=True))


# ---- results ----


@dataclasses.dataclass(frozen=True)
class Differences:
    """Differences between two actions, as fractions of each dimension's range (1 % to 99 % of the training data).

    Mean and percentile are computed per episode and averaged over the episodes; otherwise failed episodes, which are
    many times longer, would dominate.
    """

    count: int
    mean: float | None
    """Mean over differences and dimensions; None if there are no differences."""
    p95: float | None
    """95th percentile of the mean over the dimensions."""
    dimension_means: dict[str, float]
    """Mean per action dimension, without dimensions that have no range."""
    dimension_p95s: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ControlResult:
    """Result of one mode at one delay, over all episodes."""

    mode: str
    delay: int
    """Control steps from an observation to its chunk."""
    episodes: int
    success_rate: float
    """0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of the success rate."""
    steps_to_success: float | None
    """Mean over the successful episodes, including steps in which the robot was held; None if none succeeded."""
    jumps: Differences
    """Differences at chunk borders between the action that the old chunk has for the step and the executed one. Borders
    at which the old chunk has no action are left out."""
    changes_at_borders: Differences
    """Changes between consecutive commands of different chunks, or when the robot stops or starts."""
    changes_inside: Differences
    """Changes between consecutive commands of the same chunk."""
    steps: int
    """Number of commands in all episodes."""
    chunks: int
    waits: int
    """Steps without an action as expected: before the first chunk, and between chunks in "sync"."""
    holds: int
    """Steps in which the robot was held because a chunk was late."""
    late_chunks: int
    stopped: int
    """Number of episodes that the control loop ended."""


@dataclasses.dataclass(frozen=True)
class ControlBenchmark:
    """Result of `bench_control`."""

    policy: str
    env: str
    tasks: tuple[str, ...]
    episodes: int
    """Episodes per task, the same for each mode and delay."""
    seed: int
    action_horizon: int
    execute_steps: int | None
    """Executed actions before the next chunk is requested, except in "ensemble"; None: half of the chunk."""
    late: str
    """Behaviour when the actions run out before the next chunk arrives: hold or stop."""
    results: tuple[ControlResult, ...]
    left_out: tuple[str, ...]
    """Descriptions of modes and delays that the policy does not support."""
    seconds: float
    """Wall-clock duration of the benchmark."""


# ---- episodes ----


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
        env: one of `ENVIRONMENTS`, with the policy's robot.
        tasks: names of tasks.
        episodes: episodes per task, mode and delay.
        delays: delays in control steps.
        modes: names in `MODES`; None: all that the policy supports.
        seed: seed of episodes and noise; the episodes are those of `evaluate`.
        execute_steps: executed actions before the next chunk is requested; None: the policy's recommendation, or half
            of its chunk. Always 1 in "ensemble".
        late: "hold" or "stop", see `ControlSettings`; applies if d > H − s. ("slow" needs a chunk that takes longer
            than the previous ones, which does not happen here.)
        workers: processes with one thread each; None: as many as CPU cores and memory allow, or 1 for a `Policy`.
        progress: show a progress bar on stderr.
    """
    start = time.perf_counter()
    loaded = load_policy(policy, device="cpu") if isinstance(policy, str) else policy
    check_tasks(env, tasks)
    max_prefix = int(loaded.metadata.get(MAX_ACTION_PREFIX, 0))
    modes = list(modes) if modes is not None else [mode for mode in MODES if mode != TRAINED or max_prefix]
    _check(modes, delays, episodes, max_prefix)
    rollout = checked_rollout(loaded, env, Rollout(execute_steps=execute_steps))
    runs = [(mode, delay) for mode in modes for delay in delays if mode != TRAINED or delay <= max_prefix]
    jobs = [Job(*run, task, index) for task in tasks for run in runs for index in range(episodes)]
    workers = _num_workers(policy, loaded, workers, len(jobs))
    make_work = partial(Episodes, policy if workers > 1 else loaded, env, seed, rollout.execute_steps, late)
    outcomes: dict[tuple[str, int], list[Outcome]] = {run: [] for run in runs}
    with progress_bar("episodes", len(jobs), shown=progress) as advance:
        for job, outcome in zip(jobs, run_jobs(make_work, jobs, workers=workers, label=Job.label), strict=True):
            outcomes[job.mode, job.delay].append(outcome)
            advance(f"{job.mode} at delay {job.delay}")
    too_long = [str(delay) for delay in delays if delay > max_prefix]
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
        left_out=(f"{TRAINED} at delays {', '.join(too_long)}: trained for at most {max_prefix}",)
        if too_long and TRAINED in modes
        else (),
        seconds=time.perf_counter() - start,
    )


def _check(modes: Sequence[str], delays: Sequence[int], episodes: int, max_prefix: int) -> None:
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UsageError(f"Unknown mode {', '.join(unknown)}; expected {', '.join(MODES)}.")
    if not modes or len(set(modes)) < len(modes):
        raise UsageError(f"Expected at least one mode, each once, got {', '.join(modes) or 'none'}.")
    if not delays or min(delays) < 0 or len(set(delays)) < len(delays):
        raise UsageError(f"Expected delays of 0 or more steps, each once, got {', '.join(map(str, delays)) or 'none'}.")
    if episodes < 1:
        raise UsageError(f"Expected at least one episode per task, got {episodes}.")
    if TRAINED in modes and not max_prefix:
        raise UsageError(
            f"Mode {TRAINED} needs a policy that was trained with an action prefix (max_action_prefix of a training); "
            f"this one's metadata have no {MAX_ACTION_PREFIX}. Use rtc."
        )


def _num_workers(policy: str | Policy, loaded: Policy, workers: int | None, jobs: int) -> int:
    if not isinstance(policy, str):
        if workers not in (None, 1):
            raise UsageError(f"A Policy object can't be shared by {workers} processes; pass its path, or workers=1.")
        return 1
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return default_workers(jobs, bytes_each=2 * weights) if workers is None else workers


def _result(mode: str, delay: int, outcomes: Sequence[Outcome], policy: Policy) -> ControlResult:
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
    """Mean over the episodes, by dimension."""
    return dict(zip(names, np.mean(episodes, axis=0).tolist(), strict=True))


# ---- report ----


def plot_control(benchmark: ControlBenchmark) -> "Figure":
    """Plot success with its interval, jumps and changes at chunk borders, and steps to success over the delay."""
    return draw_figure(lambda figure: _draw_control(figure, benchmark), size=(15.0, 4.2))


def _draw_control(figure: "Figure", benchmark: ControlBenchmark) -> None:
    success, jumps, changes, steps = figure.subplots(1, 4)
    modes = list(dict.fromkeys(result.mode for result in benchmark.results))
    for position, mode in enumerate(modes):
        found = [result for result in benchmark.results if result.mode == mode]
        # Side by side, because the modes' intervals would hide each other.
        delays = np.array([result.delay for result in found]) + 0.12 * (position - (len(modes) - 1) / 2)
        rates = np.array([result.success_rate for result in found])
        low, high = np.array([result.interval for result in found]).T
        line: dict[str, Any] = {"color": COLORS[_COLORS[mode]], "marker": "o", "markersize": 4, "linewidth": 1.6}
        success.errorbar(delays, rates, [rates - low, high - rates], label=mode, elinewidth=1, capsize=2, **line)
        # If most old chunks end before the new ones begin, the remaining jumps are not representative.
        _draw(jumps, delays, [r.jumps.mean if r.jumps.count > r.chunks / 2 else None for r in found], **line)
        _draw(changes, delays, [result.changes_at_borders.mean for result in found], **line)
        _draw(steps, delays, [result.steps_to_success for result in found], **line)
    for axes, title, unit in (
        (success, "Success rate", "share, 95 % interval"),
        (jumps, "Jump between the chunks", "mean / action range"),
        (changes, "Change of command at borders", "mean / action range"),
        (steps, "Steps to success", "mean, control steps"),
    ):
        label_axes(axes, x="delay, control steps", y=unit, title=title)
        axes.set_xticks(sorted({float(result.delay) for result in benchmark.results}))
        axes.set_ylim(bottom=0)
    success.set_ylim(0, 1.05)
    figure.legend(loc="outside lower center", ncols=len(modes))
    figure.suptitle(f"{benchmark.policy}: {', '.join(benchmark.tasks)}, episodes of each: {benchmark.episodes}")


def _draw(axes: "Axes", delays: np.ndarray, values: Sequence[float | None], **style: Any) -> None:
    axes.plot(delays, np.array(values, float), **style)  # a gap where there is none


def _print_table(benchmark: ControlBenchmark, console: Console) -> None:
    execute = benchmark.execute_steps or "half of it"
    console.print(
        f"{benchmark.policy} in {benchmark.env}: {', '.join(benchmark.tasks)}, {benchmark.episodes} episodes each; "
        f"chunks of {benchmark.action_horizon}, requested after {execute}; late: {benchmark.late}"
    )
    titles = ("delay", "success", "interval", "steps", "jump", "p95", "border", "inside", "held", "late")
    rows = []
    for result in benchmark.results:
        low, high = (round(100 * end) for end in result.interval)
        values = (result.jumps.mean, result.jumps.p95, result.changes_at_borders.mean, result.changes_inside.mean)
        rows.append(
            [
                *(result.mode, str(result.delay), f"{result.success_rate:.0%}", f"{low}–{high}%"),
                _number(result.steps_to_success, ".0f"),
                *(_number(value, ".3f") for value in values),
                f"{(result.waits + result.holds) / result.episodes:.0f}",
                f"{result.late_chunks / result.episodes:.1f}",
            ]
        )
    table = Table("mode", box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # fits 80 columns
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "steps: to success. jump: difference at chunk borders between the old chunk's action and the executed one. "
        "border, inside: change between consecutive commands at borders and within chunks. These are fractions of the "
        "action range. Per episode, held: steps without an action; late: chunks before which the actions ran out."
    )
    for line in benchmark.left_out:
        console.print(f"left out: {line}")
    console.print(f"{benchmark.seconds:.0f} s")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def main(
    policy: str = "demo",
    tasks: str = "drawer-open,faucet-open",
    episodes: int = 10,
    delays: str = "0,1,2,4,8",
    modes: str | None = None,
    env: str = "metaworld",
    execute_steps: int | None = None,
    late: Literal["hold", "stop"] = "hold",
    seed: int = 0,
    workers: int | None = None,
    out: pathlib.Path | None = None,
    as_json: bool = False,
) -> None:
    """Run the episodes and print a table.

    Args:
        policy: policy folder or checkpoint; by default the embedded policy.
        tasks: names of tasks, separated by commas.
        episodes: episodes per task, mode and delay.
        delays: control steps from an observation to its chunk, separated by commas.
        modes: sync, async, ensemble, rtc (guided towards the old chunk) and rtc-trained (conditioned on its first
            actions), separated by commas; by default all that the policy supports.
        env: simulator.
        execute_steps: executed actions before the next chunk is requested; by default the policy's recommendation.
            Always 1 in ensemble.
        late: behaviour when the actions run out before the next chunk arrives: hold the robot, or stop.
        seed: seed of episodes and noise.
        workers: number of processes; by default as many as CPU cores and memory allow.
        out: folder for control.json and control.png.
        as_json: print one JSON document.
    """
    benchmark = bench_control(
        policy,
        env=env,
        tasks=tasks.split(","),
        episodes=episodes,
        delays=[int(delay) for delay in delays.split(",")],
        modes=None if modes is None else modes.split(","),
        seed=seed,
        execute_steps=execute_steps,
        late=late,
        workers=workers,
    )
    _print_table(benchmark, Console(stderr=as_json, highlight=False))
    document = json.dumps(dataclasses.asdict(benchmark))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "control.json").write_text(document + "\n", encoding="utf-8")
        save_figure(plot_control(benchmark), out / "control.png")
    if as_json:
        print(document)


if __name__ == "__main__":
    tyro.cli(main)
