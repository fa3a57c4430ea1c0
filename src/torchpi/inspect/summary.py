"""Summary of a trace with repeated entries merged, and comparison of two traces."""

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
    """Entries of one step that differ only in layer, time or camera."""

    name: str
    entry: TraceEntry
    """First of the entries."""
    repeats: int
    stats: Stats | None
    """Statistics over all entries."""

    @property
    def shape(self) -> str:
        """Shape, or the value of a count or text."""
        return format_shape(self.entry.shape) if self.entry.value is None else str(self.entry.value)

    @property
    def tag(self) -> str:
        """ "joint", "cached" or "training"; "" if none of these applies."""
        if self.entry.phase == "training":
            return "training"
        return self.entry.view if self.entry.view != "both" and self.entry.phase != "inference" else ""


def rows_of(trace: Trace, step: str) -> list[Row]:
    """Rows of a step."""
    groups: dict[tuple[object, ...], list[TraceEntry]] = {}
    for entry in trace.entries:
        if entry.step == step:
            key = (*_pattern(entry, trace), entry.shape, entry.dtype, entry.view, entry.phase)
            groups.setdefault(key, []).append(entry)
    return [
        Row(_range_name(entries[0], entries[-1], trace), entries[0], len(entries), _merge_stats(entries))
        for entries in groups.values()
    ]


def _pattern(entry: TraceEntry, trace: Trace) -> list[str]:
    """Parts of a name, with placeholders for cameras, layer numbers and times."""
    parts = entry.name.split("/")
    return [_CAMERA if part in trace.inputs.cameras else _REPEATED.sub(r"\1#", part) for part in parts]


def _range_name(first: TraceEntry, last: TraceEntry, trace: Trace) -> str:
    """Name of a range of entries, such as `cache/layer_0…17/k`."""
    names = []
    parts = zip(_pattern(first, trace), first.name.split("/"), last.name.split("/"), strict=True)
    for pattern, first_part, last_part in parts:
        if first_part == last_part:
            names.append(first_part)
        elif pattern == _CAMERA:
            names.append(_CAMERA)
        else:
            names.append(f"{first_part}…" + _REPEATED.sub(r"\2", last_part))
    return "/".join(names)


def _merge_stats(entries: list[TraceEntry]) -> Stats | None:
    stats = [entry.stats for entry in entries if entry.stats is not None]
    if not stats:
        return None
    mean = sum(s.mean for s in stats) / len(stats)
    variance = sum(s.std**2 + (s.mean - mean) ** 2 for s in stats) / len(stats)
    return Stats(min(s.min for s in stats), mean, max(s.max for s in stats), variance**0.5)


def facts(trace: Trace) -> dict[str, dict[str, str]]:
    """Facts about the model: "architecture" follows from the variant, "sizes" from the config."""
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
    """Tensor names by phase: training only, inference only, joint view only, or both."""
    names: dict[str, dict[str, None]] = {"training only": {}, "inference only": {}, "joint view only": {}, "both": {}}
    placeholders = (_CAMERA, "layer_#", "t=#")
    tensors = [
        ("/".join(part for part in _pattern(entry, trace) if part not in placeholders), entry)
        for entry in trace.entries
        if entry.value is None
    ]
    in_training = {name for name, entry in tensors if entry.step != "inference"}
    for name, entry in tensors:
        if entry.view == "joint":
            phase = "joint view only"
        elif entry.phase == "training":
            phase = "training only"
        else:
            phase = "both" if name in in_training else "inference only"
        names[phase][name] = None  # a dict keeps the order and drops repetitions
    return {phase: list(of_phase) for phase, of_phase in names.items()}


class Pair(NamedTuple):
    """A row of a comparison of two traces."""

    name: str
    left: str
    right: str

    @property
    def kind(self) -> str:
        """ "same", "size" if the models differ in size, or "architecture" if only one model has the row."""
        if self.left == self.right:
            return "same"
        return "architecture" if ABSENT in (self.left, self.right) else "size"


def compare_facts(left: Trace, right: Trace) -> dict[str, list[Pair]]:
    """Facts about two models, by "architecture" and "sizes"."""
    right_facts = facts(right)
    return {title: _pairs(left_facts, right_facts[title]) for title, left_facts in facts(left).items()}


def compare_steps(left: Trace, right: Trace) -> dict[str, list[Pair]]:
    """Shapes in both models, by step."""
    return {step.id: _pairs(_shapes(left, step.id), _shapes(right, step.id)) for step in STEPS}


def _shapes(trace: Trace, step: str) -> dict[str, str]:
    shapes = {}
    for row in rows_of(trace, step):
        name = f"{row.name} ({row.tag})" if row.tag else row.name
        shapes[name] = f"{row.repeats} × {row.shape}" if row.repeats > 1 else row.shape
    return shapes


def _pairs(left: Mapping[str, str], right: Mapping[str, str]) -> list[Pair]:
    return [Pair(name, left.get(name, ABSENT), right.get(name, ABSENT)) for name in {**left, **right}]
