"""RUN/metrics.jsonl: one JSON object per line, "step" and the values measured at that step."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.atomic import replace_text
from torchpi.errors import TrainingError

METRICS = "metrics.jsonl"

Line = dict[str, Any]
"""A line of metrics.jsonl: "step" and what was measured there."""

OLD_KEYS = {"learning_rate": "lr"}
"""Keys of earlier versions: readers return their present names."""


def parse_metrics(text: str) -> tuple[list[Line], list[int]]:
    """Parse the lines of a metrics.jsonl, old keys under their present names.

    A last line without its end is left out and not counted: the process was killed, or is just writing it.

    Returns:
        The lines, and the numbers (from 1) of those that can't be read.
    """
    lines: list[Line] = []
    broken = []
    *complete, last = text.split("\n")
    for i, line in enumerate([*complete, last], start=1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict) and type(found.get("step")) is int:
            lines.append({OLD_KEYS.get(key) or key: value for key, value in found.items()})
        elif i <= len(complete):
            broken.append(i)
    return lines, broken


def read_metrics(path: pathlib.Path) -> list[Line]:
    """Read metrics.jsonl; a missing file has no lines."""
    if not path.is_file():
        return []
    lines, broken = parse_metrics(path.read_text(encoding="utf-8", errors="replace"))
    if broken:
        raise TrainingError(
            f'{path}: line {broken[0]} is no JSON object with a "step" ({len(broken)} such lines); remove it to '
            "continue."
        )
    return lines


def drop_metrics_after(path: pathlib.Path, step: int) -> None:
    """Drop the lines of an interrupted run behind the checkpoint that it is resumed from."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))


def without_overtaken(lines: Sequence[Line]) -> list[Line]:
    """The lines that hold: where the steps go back, the run was resumed there, and what it had beyond is void."""
    kept: list[Line] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def number(value: Any) -> float | None:
    """The value where it is a number, NaN and infinity among them."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names, as `Tracker.log` takes them.

    Mappings become groups: {"success": {"reach": {"success_rate": 1.0}}} is "success/reach/success_rate". Lists are
    left out: fifty curves for the fifty steps of a chunk show nobody anything.
    """
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": found for inner, found in scalars(value).items()}
        elif name != "step" and (found := number(value)) is not None:
            flat[name] = found
    return flat
