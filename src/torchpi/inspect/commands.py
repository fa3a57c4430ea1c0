"""Implementation of the trace, doctor and compare commands: a JSON document on stdout, or tables."""

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
    """Console without markup; `width` applies if stdout is not a terminal."""
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
    """Trace one target, or compare two; `source` belongs to the first one."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        trace = trace_forward(find_inputs(targets[0], shapes, source, **load))
        other = None
        if len(targets) == 2:
            without_input = dataclasses.replace(source, inputs=None, dataset=None)
            other = trace_forward(find_inputs(targets[1], shapes, without_input, **load))
        if html is not None:
            from torchpi.inspect.page import render_page

            replace_text(html, render_page(trace, other))
    if as_json:
        print_json([entry.to_json() for entry in trace.entries] if other is None else _comparison_json(trace, other))
    elif other is None:
        print_trace(trace, plain_console(160 if trace.values else 120))
    else:
        print_comparison(trace, other, plain_console())
    if html is not None:
        print(f"wrote {html}", file=sys.stderr if as_json else sys.stdout)


def _comparison_json(left: Trace, right: Trace) -> dict[str, Any]:
    def rows(tables: Mapping[str, Sequence[Pair]], key: str) -> list[dict[str, str]]:
        return [{key: title, **row._asdict()} for title, table in tables.items() for row in table]

    def side(trace: Trace) -> dict[str, Any]:
        return {
            "title": trace.inputs.title,
            "facts": {name: text for part in facts(trace).values() for name, text in part.items()},
            "kv_cache_bytes": trace.cache_bytes,
            "phases": phases(trace),
            "agreement": [pair._asdict() for pair in trace.values.agreement] if trace.values else None,
            "entries": [entry.to_json() for entry in trace.entries],
        }

    return {
        "facts": rows(compare_facts(left, right), "kind"),
        "steps": rows(compare_steps(left, right), "step"),
        "left": side(left),
        "right": side(right),
    }


def run_doctor(
    path: str,
    *,
    observation: pathlib.Path | None = None,
    dataset: Mapping[str, Any] | None = None,
    as_json: bool = False,
    **load: Any,
) -> int:
    """Diagnose a policy and print the result; returns exit status 1 if there is a problem."""
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
    """Compare two policies and print the result; returns exit status 1 if they differ.

    The options in `load` apply to checkpoints, not to policy folders, which are complete by themselves. Options for
    LoRA or doubled embeddings apply only to a checkpoint that has these, if either has.
    """
    checkpoints = [path for path in (a, b) if not is_policy_folder(existing_folder(path))]
    if load and not checkpoints:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in load)
        raise UsageError(f"{a} and {b} are policy folders, which are complete; omit {names}.")
    targets: dict[str, list[str]] = {"lora_alpha": [], "embedding": []}
    if targets.keys() & load.keys():
        for path in checkpoints:
            checkpoint = open_checkpoint(path, config=load.get("config"))
            targets["lora_alpha"] += [path] if checkpoint.folded else []
            targets["embedding"] += [path] if checkpoint.has_both else []

    def load_side(path: str) -> Policy:
        options: dict[str, Any] = {"emulate_fp8": emulate_fp8, "verify": verify}
        if path in checkpoints:
            options |= {name: value for name, value in load.items() if path in (targets.get(name) or checkpoints)}
        return load_policy(path, device=device, dtype=dtype, engine="eager", **options)

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        request = read_npz(observation)
        comparison = compare_policies(load_side(a), load_side(b), request, tolerance=tolerance)
    if as_json:
        print_json({"a": str(a), "b": str(b)} | comparison.to_dict())
    else:
        print_compared(comparison, plain_console(), title=f"torchpi compare: A {a}, B {b}")
    return comparison.status
