"""A trace in fewer rows: what repeats is one row, and what two models have in common stands side by side."""

import dataclasses
import re

from torchpi.trace.record import Stats, TraceEntry
from torchpi.trace.result import Trace
from torchpi.trace.steps import STEPS
from torchpi.ui.format import format_count, format_shape

_REPEATED = re.compile(r"(layer_|t=)([\d.]+)")
ABSENT = "—"


@dataclasses.dataclass(frozen=True)
class Row:
    """Tensors of one step that differ in layer, time or camera only."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    phase: str
    count: int
    value: int | None
    stats: Stats | None
    """Over all of them."""

    @property
    def shape_text(self) -> str:
        """The shape, or the value of a count."""
        return format_shape(self.shape) if self.value is None else str(self.value)


def rows_of(trace: Trace, step: str) -> list[Row]:
    """The tensors of a step, repetitions in one row."""
    cameras = trace.cameras
    groups: dict[tuple[object, ...], list[TraceEntry]] = {}
    for entry in trace.entries:
        if entry.step == step:
            key = (_template(entry.name, cameras), entry.shape, entry.dtype, entry.view, entry.phase)
            groups.setdefault(key, []).append(entry)
    return [_row(entries, cameras) for entries in groups.values()]


def _template(name: str, cameras: list[str]) -> str:
    """The name without what repetitions differ in."""
    return _REPEATED.sub(r"\1#", "/".join("‹camera›" if part in cameras else part for part in name.split("/")))


def _row(entries: list[TraceEntry], cameras: list[str]) -> Row:
    first, last = entries[0], entries[-1]
    parts = zip(first.name.split("/"), last.name.split("/"), strict=True)
    name = "/".join(one if one == other else _range(one, other, cameras) for one, other in parts)
    return Row(name, first.shape, first.dtype, first.view, first.phase, len(entries), first.value, _merged(entries))


def _range(one: str, other: str, cameras: list[str]) -> str:
    if one in cameras:
        return "‹camera›"
    return f"{one}…{_REPEATED.sub(lambda match: match[2], other)}"


def _merged(entries: list[TraceEntry]) -> Stats | None:
    found = [entry.stats for entry in entries if entry.stats is not None]
    if not found:
        return None
    mean = sum(stats.mean for stats in found) / len(found)
    variance = sum(stats.std**2 + (stats.mean - mean) ** 2 for stats in found) / len(found)
    return Stats(min(s.min for s in found), mean, max(s.max for s in found), variance**0.5)


def facts(trace: Trace) -> dict[str, int | str]:
    """The numbers that one wants to know first."""
    return {
        "sequence length": trace.sequence_length,
        "prefix tokens": trace.prefix_tokens,
        "suffix tokens": trace.suffix_tokens,
        "attention groups": trace.num_groups,
        "KV cache of one observation": f"{trace.cache_bytes / 1e6:.1f} MB in {trace.dtype}",
        "layers": trace.layers,
        "time injections, all": trace.time_inputs,
        "time injections, in the layers": trace.time_injections,
        "parameters": format_count(sum(trace.parameters.values())),
    }


def phases(trace: Trace) -> dict[str, list[str]]:
    """What exists in training only, in inference only, in both, and in neither: the joint view, drawn for reading."""
    found: dict[str, dict[str, None]] = {"training only": {}, "inference only": {}, "both": {}, "joint view only": {}}
    cameras = trace.cameras
    in_training = {_base(entry.name, cameras) for entry in trace.entries if entry.step != "inference"}
    for entry in trace.entries:
        name = _base(entry.name, cameras)
        if entry.value is not None:
            continue
        if entry.view == "joint":
            phase = "joint view only"
        elif entry.phase == "training":
            phase = "training only"
        elif entry.step == "inference" and name not in in_training:
            phase = "inference only"
        else:
            phase = "both"
        found[phase][name] = None
    return {phase: list(names) for phase, names in found.items()}


def _base(name: str, cameras: list[str]) -> str:
    """A tensor's name without camera, layer and time."""
    parts = [part for part in name.split("/") if part not in cameras and not _REPEATED.fullmatch(part)]
    return "/".join(parts)


def compare_facts(left: Trace, right: Trace) -> list[tuple[str, str, str]]:
    """The facts of two models side by side."""
    others = facts(right)
    return [(name, str(value), str(others[name])) for name, value in facts(left).items()]


def compare_steps(left: Trace, right: Trace) -> dict[str, list[tuple[str, str, str]]]:
    """Per step: name, shape in the one model, shape in the other."""
    compared = {}
    for step in STEPS:
        one, other = ({f"{row.name}{_view(row)}": row for row in rows_of(trace, step.id)} for trace in (left, right))
        names = list(dict.fromkeys([*one, *other]))
        compared[step.id] = [(name, _shape_in(one, name), _shape_in(other, name)) for name in names]
    return compared


def _view(row: Row) -> str:
    return f" ({row.view})" if row.view != "both" and row.phase != "inference" else ""


def _shape_in(side: dict[str, Row], name: str) -> str:
    if name not in side:
        return ABSENT
    row = side[name]
    return f"{row.count} × {row.shape_text}" if row.count > 1 else row.shape_text
