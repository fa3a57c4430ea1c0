"""What a trace is made of: tensors that existed in a run, written down when they did."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Stats:
    """The range of a tensor's values; of booleans, the mean is the share of True."""

    min: float
    mean: float
    max: float
    std: float


@dataclasses.dataclass(frozen=True)
class TraceEntry:
    """One tensor of the run."""

    step: str
    """"0" to "11", with "7-1" to "7-7", and "inference"."""
    name: str
    """In the field's terms; parts are separated by '/'."""
    shape: tuple[int, ...]
    dtype: str
    view: str = "both"
    """"joint": exists only in the joint forward of the papers; "cached": only in what the model really computes,
    prefill + velocity; "both": in both."""
    phase: str = "both"
    """"training" or "inference", where it exists in one of them only."""
    value: int | None = None
    """Of a count, which is not a tensor: its value."""
    stats: Stats | None = None
    """Where the model has weights and an input."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is None is left out."""
        entry: dict[str, Any] = dataclasses.asdict(self) | {"shape": list(self.shape)}
        if self.stats is not None:
            entry["stats"] = {key: value if math.isfinite(value) else None for key, value in entry["stats"].items()}
        return {key: value for key, value in entry.items() if value is not None}


class Recorder:
    """Collects entries; keeps no tensor."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, tuple[int, ...], str], TraceEntry] = {}

    def tensor(self, step: str, name: str, tensor: Tensor, *, view: str = "both", phase: str = "both") -> None:
        """Write down a tensor; if the other view had it, with the same shape and dtype, it is in both."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = TraceEntry(step, name, tuple(tensor.shape), dtype, view, phase, stats=stats_of(tensor))
        key = (step, name, entry.shape, entry.dtype)
        met = self._entries.get(key)
        self._entries[key] = entry if met is None else dataclasses.replace(met, view="both")

    def count(self, step: str, name: str, value: int) -> None:
        """Write down how often something happened in the run."""
        self._entries[step, name, (), "int64"] = TraceEntry(step, name, (), "int64", value=value)

    def entries(self, order: Iterable[str]) -> list[TraceEntry]:
        """All entries by step, in the order given, within a step in the order in which they were met."""
        rank = {step: i for i, step in enumerate(order)}
        return sorted(self._entries.values(), key=lambda entry: rank[entry.step])


def stats_of(tensor: Tensor) -> Stats | None:
    """The range of the values; None on the meta device, where there are none."""
    if tensor.is_meta or tensor.numel() == 0:
        return None
    values = tensor.detach().float()
    deviation, mean = torch.std_mean(values, correction=0)
    return Stats(values.min().item(), mean.item(), values.max().item(), deviation.item())


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module."""

    args: tuple[Any, ...]
    output: Any


@contextlib.contextmanager
def calls_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """While the context is open, every call of the modules of these names is kept, in order."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    with contextlib.ExitStack() as hooks:
        for name, found in calls.items():

            def keep(module: nn.Module, args: tuple[Any, ...], output: Any, found: list[Call] = found) -> None:
                found.append(Call(args, output))

            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield calls
