"""The commands trace, doctor and compare: one JSON document on stdout, or tables for people."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from torchpi.arrays import read_npz
from torchpi.atomic import replace_text
from torchpi.checkpoints.address import existing_folder
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.folder import is_policy_folder
from torchpi.errors import UsageError
from torchpi.inspect.compare import TOLERANCE, compare_policies
from torchpi.inspect.doctor import diagnose
from torchpi.inspect.inputs import Shapes, Source, find_inputs
from torchpi.inspect.summary import Pair, compare_facts, compare_steps, facts, phases
from torchpi.inspect.text import print_compared, print_comparison, print_diagnosis, print_trace
from torchpi.inspect.trace import Trace, trace_forward
from torchpi.policy import Policy, load_policy
from torchpi.ui.format import print_json
from torchpi.ui.tables import PlainConsole


def plain_console(width: int = 120) -> Console:
    """A console of plain text, so wide where stdout is no terminal."""
    return PlainConsole(width=None if sys.stdout.isatty() else width)


def run_trace(
    targets: Sequence[str],
    shapes: Shapes,
    source: Source,
    *,
    html: pathlib.Path | None = None,
    as_json: bool = False,
    **load: Any,
) -> None:
    """Trace one target, or compare two, and print it; `source` is the first one's."""
    if len(targets) not in (1, 2):
        raise UsageError(f"Expected one target, or two with --compare, got {len(targets)}: {', '.join(targets)}.")
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        sources = (source, dataclasses.replace(source, inputs=None, dataset=None))
        traces = [
            trace_forward(find_inputs(target, shapes, its_source, **load))
            for target, its_source in zip(targets, sources, strict=False)
        ]
        if html is not None:
            from torchpi.inspect.page import render_page

            replace_text(html, render_page(*traces))
    if as_json:
        print_json([entry.to_json() for entry in traces[0].entries] if len(traces) == 1 else _comparison(*traces))
    elif len(traces) == 1:
        print_trace(traces[0], plain_console(160 if traces[0].values else 120))
    else:
        print_comparison(traces[0], traces[1], plain_console())
    if html is not None:
        print(f"wrote {html}", file=sys.stderr if as_json else sys.stdout)


def _comparison(left: Trace, right: Trace) -> dict[str, Any]:
    def rows(tables: Mapping[str, Sequence[Pair]], key: str) -> list[dict[str, str]]:
        return [{key: title, **row._asdict()} for title, table in tables.items() for row in table]

    sides = {
        side: {
            "title": trace.inputs.title,
            "facts": {name: text for part in facts(trace).values() for name, text in part.items()},
            "kv_cache_bytes": trace.cache_bytes,
            "phases": phases(trace),
            "agreement": [pair._asdict() for pair in trace.values.agreement] if trace.values else None,
            "entries": [entry.to_json() for entry in trace.entries],
        }
        for side, trace in (("left", left), ("right", right))
    }
    return {
        "facts": rows(compare_facts(left, right), "kind"),
        "steps": rows(compare_steps(left, right), "step"),
        **sides,
    }


def run_doctor(
    path: str,
    *,
    observation: pathlib.Path | None = None,
    dataset: Mapping[str, Any] | None = None,
    as_json: bool = False,
    **load: Any,
) -> int:
    """Examine a policy and print the diagnosis; the exit status is 1 if there is a problem."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        request = None if observation is None else read_npz(observation)
        policy = load_policy(path, engine="eager", **load)
        diagnosis = diagnose(policy, request, dataset=dataset)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        print_diagnosis(policy, diagnosis, plain_console(), title=str(path))
    return diagnosis.status


def run_compare(
    a: str,
    b: str,
    *,
    observation: pathlib.Path,
    as_json: bool = False,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    emulate_fp8: bool = False,
    verify: bool = True,
    **load: Any,
) -> int:
    """Compare two policies and print the comparison; the exit status is 1 if they differ.

    A policy folder states everything, and does not take the options of `load`; at least one of the two has to.
    """
    takers = [path for path in (a, b) if not is_policy_folder(existing_folder(path))]
    if load and not takers:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in load)
        raise UsageError(f"{a} and {b} are policy folders, which state everything: leave out {options}.")
    owners: dict[str, list[str]] = {"lora_alpha": [], "embedding": []}
    for path in takers if owners.keys() & load.keys() else ():
        checkpoint = open_checkpoint(path, config=load.get("config"))
        owners["lora_alpha"] += [path] if checkpoint.folded else []
        owners["embedding"] += [path] if checkpoint.has_both else []

    def loaded(path: str) -> Policy:
        own = {name: value for name, value in load.items() if path in (owners.get(name) or takers)}
        more = {"emulate_fp8": emulate_fp8, "verify": verify, **(own if path in takers else {})}
        return load_policy(path, device=device, dtype=dtype, engine="eager", **more)

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        request = read_npz(observation)
        comparison = compare_policies(loaded(a), loaded(b), request, tolerance=tolerance)
    if as_json:
        print_json({"a": str(a), "b": str(b)} | comparison.to_dict())
    else:
        print_compared(comparison, plain_console(), title=f"torchpi compare: A {a}, B {b}")
    return comparison.status
