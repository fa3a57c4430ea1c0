"""Report of a control loop's run."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from torchpi_client.limits import ActionLimits


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 step`, `2 steps`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclasses.dataclass
class Tally:
    """Count, sum and maximum of several numbers."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.largest = max(self.largest, value)

    @property
    def mean(self) -> float:
        """Mean, or 0 without numbers."""
        return self.total / self.count if self.count else 0.0


@dataclasses.dataclass
class ControlReport:
    """Counts of all events of one run. It can be read at any time."""

    names: Sequence[str] = ()
    """Names of the action dimensions, for `summary`."""
    steps: int = 0
    """Control steps."""
    actions: int = 0
    """Executed actions of the policy."""
    waits: int = 0
    """Steps for which no action was expected: before the first chunk, and between chunks in mode "sync"."""
    holds: int = 0
    """Steps in which the robot was held because a chunk was late or too uncertain."""
    slowed: int = 0
    """Actions that took two steps because a chunk was late."""
    chunks: int = 0
    """Executed chunks."""
    late_chunks: int = 0
    """Requests during which the actions ran out."""
    stale_chunks: int = 0
    """Chunks that arrived too late and were refused, or whose rest became stale during an overrun."""
    uncertain_chunks: int = 0
    """Chunks that were refused because of their uncertainty, see `ControlSettings.max_uncertainty`."""
    uncertainty: Tally = dataclasses.field(default_factory=Tally)
    """Uncertainty of each chunk, if the server sends it; without the warm-up."""
    failed_requests: int = 0
    """Requests that exceeded their deadline or that a busy server refused."""
    reconnects: int = 0
    """Reconnections to the policy server."""
    latency: Tally = dataclasses.field(default_factory=Tally)
    """Seconds from each observation to its chunk, without the warm-up."""
    discarded: Tally = dataclasses.field(default_factory=Tally)
    """Number of actions per executed chunk whose steps had passed when it arrived."""
    overruns: Tally = dataclasses.field(default_factory=Tally)
    """Seconds by which steps exceeded their period."""
    missed_steps: int = 0
    """Steps skipped because of overruns."""
    invalid: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """[a]: actions with NaN or infinity in this dimension, which were not executed."""
    range_clipped: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """[a]: commands clipped to the range."""
    step_clipped: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """[a]: commands clipped to the largest step."""
    limited: bool = False
    """True if the commands were limited."""
    dry_run: bool = False
    """True if nothing was sent to the robot."""
    stopped: str | None = None
    """The reason for an early end, or None."""

    def summary(self) -> str:
        """A few lines of text."""
        dry_run = " (dry run: nothing was sent)" if self.dry_run else ""
        lines = [
            f"{counted(self.steps, 'step')}{dry_run}: {counted(self.actions, 'action')}, {self.waits} waiting, "
            f"{self.holds} held, {self.missed_steps} skipped; {counted(self.slowed, 'action')} slowed",
            f"chunks: {self.chunks}, {self.late_chunks} late, {self.stale_chunks} refused as stale, "
            f"{self.failed_requests} without an answer; {counted(self.reconnects, 'reconnect')}",
            f"latency {1e3 * self.latency.mean:.1f} ms on average, {1e3 * self.latency.largest:.1f} ms at most; "
            f"discarded {self.discarded.mean:.1f} actions per chunk on average, {self.discarded.largest:.0f} at most",
            f"{counted(self.overruns.count, 'overrun')}, {1e3 * self.overruns.mean:.1f} ms on average, "
            f"{1e3 * self.overruns.largest:.1f} ms at most",
            f"NaN or infinity: {self._per_dimension(self.invalid)}",
            f"outside the range: {self._per_dimension(self.range_clipped)}" if self.limited else "no limits",
        ]
        if self.limited:
            lines.append(f"too large a step: {self._per_dimension(self.step_clipped)}")
        if self.uncertainty.count:
            lines.append(
                f"uncertainty {self.uncertainty.mean:.3g} on average, {self.uncertainty.largest:.3g} at most; "
                f"{counted(self.uncertain_chunks, 'chunk')} refused as uncertain"
            )
        if self.stopped is not None:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join(lines)

    def _per_dimension(self, counts: np.ndarray) -> str:
        names = _titles(self.names, len(counts))
        return ", ".join(f"{name} {count}" for name, count in zip(names, counts) if count) or "none"


def format_chunk(chunk: np.ndarray, names: Sequence[str] = (), limits: ActionLimits | None = None) -> str:
    """Format a chunk [H, a] as a table with one row per step.

    Values that are not finite or outside the limits' range are marked with "!".

    Args:
        names: names of the dimensions; by default their indices.
    """
    titles = _titles(names, chunk.shape[1])
    marked = ~np.isfinite(chunk)
    if limits is not None:
        marked |= (chunk < limits.low) | (chunk > limits.high)
    width = max(10, *(len(title) + 2 for title in titles))
    rows = ["step" + "".join(title.rjust(width) for title in titles)]
    for step, (values, marks) in enumerate(zip(chunk, marked)):
        cells = (f"{value:.4f}{'!' if mark else ' '}".rjust(width) for value, mark in zip(values, marks))
        rows.append(f"{step:4d}" + "".join(cells))
    return "\n".join(rows)


def _titles(names: Sequence[str], count: int) -> list[str]:
    """The names, or indices if their number does not fit."""
    return list(names) if len(names) == count else [str(i) for i in range(count)]
