"""A trace in fewer rows: repetitions are one row, and two models stand next to each other."""

import dataclasses
import re

from torchpi.inspect.steps import STEPS
from torchpi.inspect.trace import Stats, Trace, TraceEntry
from torchpi.ui.format import format_count, format_shape

_REPEATED = re.compile(r"(layer_|t=)([\d.]+)")
ABSENT = "—"
STATS = tuple(field.name for field in dataclasses.fields(Stats))


@dataclasses.dataclass(frozen=True)
class Row:
    """Entries of one step that differ in layer, time or camera only."""

    entry: TraceEntry
    """The first of them, with the name and the stats of all."""
    count: int

    @property
    def shape(self) -> str:
        """The shape, or the value of a count or text."""
        return format_shape(self.entry.shape) if self.entry.value is None else str(self.entry.value)

    @property
    def tag(self) -> str:
        """ "joint", "cached" or "training"; "": both."""
        if self.entry.phase == "training":
            return "training"
        return self.entry.view if self.entry.view != "both" and self.entry.phase != "inference" else ""


def rows_of(trace: Trace, step: str) -> list[Row]:
    """The rows of a step."""
    groups: dict[tuple[object, ...], list[TraceEntry]] = {}
    for entry in trace.entries:
        if entry.step == step:
            name = "/".join("‹camera›" if part in trace.cameras else part for part in entry.name.split("/"))
            key = (_REPEATED.sub(r"\1#", name), entry.shape, entry.dtype, entry.view, entry.phase)
            groups.setdefault(key, []).append(entry)
    return [_row(entries, trace.cameras) for entries in groups.values()]


def _row(entries: list[TraceEntry], cameras: list[str]) -> Row:
    parts = zip(entries[0].name.split("/"), entries[-1].name.split("/"), strict=True)
    name = "/".join(one if one == other else _range(one, other, cameras) for one, other in parts)
    return Row(dataclasses.replace(entries[0], name=name, stats=_merged(entries)), len(entries))


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


def architecture(trace: Trace) -> dict[str, str]:
    """The facts that follow from the variant."""
    pi05 = trace.config.pi05
    return {
        "variant": trace.variant,
        "time": "modulates the expert's norms" if pi05 else "is mixed into the action tokens",
        "state": "text in the prompt"
        if trace.config.discrete_state_input
        else "not read"
        if pi05
        else "a suffix token",
        "attention groups": str(trace.num_groups),
        "time injections, all": str(trace.count("time_inputs")),
        "time injections, in the layers": str(trace.count("time_injections")),
    }


def sizes(trace: Trace) -> dict[str, str]:
    """The facts that a config decides."""
    return {
        "cameras": str(len(trace.cameras)),
        "prompt tokens": str(trace.config.max_token_len),
        "action horizon × action_dim": f"{trace.config.action_horizon} × {trace.config.action_dim}",
        "sequence length": str(trace.sequence_length),
        "prefix tokens": str(trace.prefix_tokens),
        "suffix tokens": str(trace.suffix_tokens),
        "KV cache of one observation": f"{trace.cache_bytes / 1e6:.1f} MB in {trace.dtype}",
        "layers": str(trace.count("layers")),
        "parameters": format_count(sum(trace.parameters.values())),
    }


def phases(trace: Trace) -> dict[str, list[str]]:
    """Names by phase: in training only, in inference only, in the joint view only, and in both."""
    found: dict[str, dict[str, None]] = {"training only": {}, "inference only": {}, "joint view only": {}, "both": {}}
    in_training = {_base(entry.name, trace.cameras) for entry in trace.entries if entry.step != "inference"}
    for entry in trace.entries:
        name = _base(entry.name, trace.cameras)
        if entry.value is not None:
            continue
        if entry.view == "joint":
            phase = "joint view only"
        elif entry.phase == "training":
            phase = "training only"
        else:
            phase = "both" if entry.step != "inference" or name in in_training else "inference only"
        found[phase][name] = None
    return {phase: list(names) for phase, names in found.items()}


def _base(name: str, cameras: list[str]) -> str:
    """A name without camera, layer and time."""
    return "/".join(part for part in name.split("/") if part not in cameras and not _REPEATED.fullmatch(part))


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of a comparison."""

    name: str
    left: str
    right: str

    @property
    def kind(self) -> str:
        """ "same"; "size": both have it; "architecture": one of them has it."""
        if self.left == self.right:
            return "same"
        return "architecture" if ABSENT in (self.left, self.right) else "size"


def compare_facts(left: Trace, right: Trace) -> dict[str, list[Pair]]:
    """The facts of two models: their architecture, and their sizes."""
    return {
        title: [Pair(name, value, facts(right)[name]) for name, value in facts(left).items()]
        for title, facts in (("architecture", architecture), ("sizes", sizes))
    }


def compare_steps(left: Trace, right: Trace) -> dict[str, list[Pair]]:
    """Per step, the shapes in both models."""
    compared = {}
    for step in STEPS:
        one, other = ({_label(row): row for row in rows_of(trace, step.id)} for trace in (left, right))
        names = dict.fromkeys([*one, *other])
        compared[step.id] = [Pair(name, _shape(one.get(name)), _shape(other.get(name))) for name in names]
    return compared


def _label(row: Row) -> str:
    return f"{row.entry.name} ({row.tag})" if row.tag else row.entry.name


def _shape(row: Row | None) -> str:
    if row is None:
        return ABSENT
    return f"{row.count} × {row.shape}" if row.count > 1 else row.shape
