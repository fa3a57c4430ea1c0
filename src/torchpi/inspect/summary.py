"""A trace in fewer rows: repetitions are one row, and two models stand next to each other."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torchpi.inspect.diagnosis import state_input
from torchpi.inspect.steps import STEPS
from torchpi.inspect.trace import Stats, Trace, TraceEntry
from torchpi.ui.format import format_count, format_shape

_REPEATED = re.compile(r"(layer_|t=)([\d.]+)")
_CAMERA, ABSENT = "‹camera›", "—"


class Row(NamedTuple):
    """Entries of one step that differ in layer, time or camera only."""

    name: str
    entry: TraceEntry
    """The first of them."""
    repeats: int
    stats: Stats | None
    """Statistics of all of them."""

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
            key = (*_pattern(entry, trace), entry.shape, entry.dtype, entry.view, entry.phase)
            groups.setdefault(key, []).append(entry)
    return [Row(_range(rows[0], rows[-1], trace), rows[0], len(rows), _merged(rows)) for rows in groups.values()]


def _pattern(entry: TraceEntry, trace: Trace) -> list[str]:
    """The parts of a name, without the names of cameras and the numbers of layers and times."""
    parts = entry.name.split("/")
    return [_CAMERA if part in trace.inputs.cameras else _REPEATED.sub(r"\1#", part) for part in parts]


def _range(first: TraceEntry, last: TraceEntry, trace: Trace) -> str:
    """One name for several entries, as `cache/layer_0…17/k`."""
    parts = []
    for pattern, one, other in zip(_pattern(first, trace), first.name.split("/"), last.name.split("/"), strict=True):
        repeated = _CAMERA if pattern == _CAMERA else f"{one}…" + _REPEATED.sub(r"\2", other)
        parts.append(one if one == other else repeated)
    return "/".join(parts)


def _merged(entries: list[TraceEntry]) -> Stats | None:
    found = [entry.stats for entry in entries if entry.stats is not None]
    if not found:
        return None
    mean = sum(stats.mean for stats in found) / len(found)
    variance = sum(stats.std**2 + (stats.mean - mean) ** 2 for stats in found) / len(found)
    return Stats(min(s.min for s in found), mean, max(s.max for s in found), variance**0.5)


def facts(trace: Trace) -> dict[str, dict[str, str]]:
    """The facts that follow from the variant (architecture), and those that a config decides (sizes)."""
    config = trace.inputs.config
    return {
        "architecture": {
            "variant": config.variant,
            "time": "modulates the expert's norms" if config.pi05 else "is mixed into the action tokens",
            "state": state_input(config) or "not read",
            "attention groups": str(trace.num_groups),
            "time injections, all": str(trace.count("time_inputs")),
            "time injections, in the layers": str(trace.count("time_injections")),
        },
        "sizes": {
            "cameras": str(len(trace.inputs.cameras)),
            "prompt tokens": str(config.max_token_len),
            "action horizon × action_dim": f"{config.action_horizon} × {config.action_dim}",
            "sequence length": str(trace.sequence_length),
            "prefix tokens": str(trace.prefix_tokens),
            "suffix tokens": str(trace.suffix_tokens),
            "KV cache of one observation": f"{trace.cache_bytes / 1e6:.1f} MB in {trace.dtype}",
            "layers": str(trace.count("layers")),
            "parameters": format_count(sum(trace.parameters.values())),
        },
    }


def phases(trace: Trace) -> dict[str, list[str]]:
    """Names by phase: in training only, in inference only, in the joint view only, and in both."""
    found: dict[str, dict[str, None]] = {"training only": {}, "inference only": {}, "joint view only": {}, "both": {}}
    tensors = [entry for entry in trace.entries if entry.value is None]
    names = ["/".join(part for part in _pattern(entry, trace) if part not in _NUMBERED) for entry in tensors]
    in_training = {name for name, entry in zip(names, tensors, strict=True) if entry.step != "inference"}
    for name, entry in zip(names, tensors, strict=True):
        phase = "both" if name in in_training else "inference only"
        phase = "training only" if entry.phase == "training" else phase
        found["joint view only" if entry.view == "joint" else phase][name] = None
    return {phase: list(of_phase) for phase, of_phase in found.items()}


_NUMBERED = (_CAMERA, "layer_#", "t=#")


class Pair(NamedTuple):
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
    right_facts = facts(right)
    return {title: _pairs(left_facts, right_facts[title]) for title, left_facts in facts(left).items()}


def compare_steps(left: Trace, right: Trace) -> dict[str, list[Pair]]:
    """Per step, the shapes in both models."""
    return {step.id: _pairs(_shapes(left, step.id), _shapes(right, step.id)) for step in STEPS}


def _shapes(trace: Trace, step: str) -> dict[str, str]:
    shapes = {}
    for row in rows_of(trace, step):
        name = f"{row.name} ({row.tag})" if row.tag else row.name
        shapes[name] = f"{row.repeats} × {row.shape}" if row.repeats > 1 else row.shape
    return shapes


def _pairs(left: Mapping[str, str], right: Mapping[str, str]) -> list[Pair]:
    return [Pair(name, left.get(name, ABSENT), right.get(name, ABSENT)) for name in {**left, **right}]
