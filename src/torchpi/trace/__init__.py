"""`torchpi trace`: the way from an observation to an action chunk, every tensor by name, shape and dtype."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from torchpi.config import Pi0Config
from torchpi.trace.record import Stats, TraceEntry
from torchpi.trace.result import Trace
from torchpi.trace.subject import Sizes, find_subject, from_config, from_policy
from torchpi.trace.summary import compare_facts, compare_steps, facts, phases
from torchpi.trace.text import print_comparison, print_trace
from torchpi.trace.walk import walk

if TYPE_CHECKING:
    from torchpi.policy import Policy

__all__ = ["Stats", "Trace", "TraceEntry", "run_trace", "trace_steps"]


def trace_steps(
    target: "Pi0Config | Policy",
    *,
    observation: Mapping[str, Any] | None = None,
    batch: int = 4,
    max_token_len: int | None = None,
    action_horizon: int | None = None,
    action_dim: int | None = None,
) -> list[TraceEntry]:
    """Every tensor on the way, in the order of the steps.

    Args:
        target: a config, which is walked on the meta device, or a policy, whose tensors have values.
        observation: of a policy's robot; by default its example.
        batch: samples; a policy's observation is repeated.
        max_token_len, action_horizon, action_dim: instead of the target's own.
    """
    sizes = Sizes(batch, max_token_len, action_horizon, action_dim)
    if isinstance(target, Pi0Config):
        return walk(from_config(target, sizes)).entries
    return walk(from_policy(target, sizes, observation or target.example_observation())).entries


def run_trace(
    target: str,
    *,
    batch: int = 4,
    max_token_len: int | None = None,
    action_horizon: int | None = None,
    action_dim: int | None = None,
    compare: str | None = None,
    html: pathlib.Path | None = None,
    as_json: bool = False,
    inputs: pathlib.Path | None = None,
    config: str | None = None,
    device: str | None = None,
) -> None:
    """Trace a target and print it.

    Args:
        target: "pi05", "pi0" or another preset; "tiny": the embedded policy; or the path of a policy or checkpoint.
        batch, max_token_len, action_horizon, action_dim: sizes, instead of the target's own.
        compare: another target, to be put beside the first one. The sizes but for the batch are then each one's own.
        html: where to write a page with everything.
        as_json: print one JSON document on stdout, and all else on stderr.
        inputs: an .npz file: an observation of the policy's robot, or a batch in the model's terms.
        config: a preset or JSON file for checkpoints that do not say their horizon and prompt length.
        device: where a policy runs.
    """
    sizes = Sizes(batch, max_token_len, action_horizon, action_dim)
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        trace = walk(find_subject(target, sizes, inputs=inputs, config=config, device=device))
        other = None if compare is None else walk(find_subject(compare, Sizes(batch), config=config, device=device))
        if html is not None:
            from torchpi.trace.page import render_page

            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(render_page(trace, other), encoding="utf-8")
    if as_json:
        document: Any = _entries_json(trace) if other is None else _comparison_json(trace, other)
        print(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        # Plain text: names and prompts come from files, and "[4, 200]" is no markup.
        console = Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False)
        if other is None:
            print_trace(trace, console)
        else:
            print_comparison(trace, other, console)
    if html is not None:
        print(f"wrote {html}", file=sys.stderr if as_json else sys.stdout)


def _entries_json(trace: Trace) -> list[dict[str, Any]]:
    return [entry.to_json() for entry in trace.entries]


def _comparison_json(left: Trace, right: Trace) -> dict[str, Any]:
    return {
        "facts": [{"name": name, "left": one, "right": other} for name, one, other in compare_facts(left, right)],
        "steps": [
            {"step": step, "name": name, "left": one, "right": other}
            for step, rows in compare_steps(left, right).items()
            for name, one, other in rows
        ],
        **{
            side: {
                "title": trace.title,
                "facts": facts(trace),
                "kv_cache_bytes": trace.cache_bytes,
                "phases": phases(trace),
                "agreement": [dataclasses.asdict(a) for a in trace.values.agreement] if trace.values else None,
                "entries": _entries_json(trace),
            }
            for side, trace in (("left", left), ("right", right))
        },
    }
