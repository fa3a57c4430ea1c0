"""Report of `gpu_acceptance.py`: its rows as JSON, and as the Markdown tables of docs/benchmarks.md."""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpu_launches import launch_table

from torchpi.ui.format import without_nan

Row = Mapping[str, Any]
TARGET_MS = {
    ("graph", 3, 200): 12.0,
    ("graph", 2, 50): 7.0,
    ("fp8", 3, 200): 8.0,
    ("fp8", 2, 50): 5.5,
}
"""Target times of one sampling on an H200, by mode, cameras and prompt tokens; the floors are 7.4 and 5.0 ms in
bfloat16."""
TARGET_SAMPLES = {32: 30.0}
"""Target samples per second of training on an H200, by batch size."""
TARGET_LAUNCHES = 2000
Cell = Callable[[Row], str]


def is_failure(row: Row) -> bool:
    """True for an error or a failed check."""
    return "error" in row or row.get("passed") is False


def write_report(document: Mapping[str, Any], out: pathlib.Path) -> int:
    """Write OUT.json and OUT.md, print the summary, and return the number of failures."""
    rows: Sequence[Row] = document["rows"]
    failed = sum(is_failure(row) for row in rows)
    summary = {
        "passed": sum(row.get("passed") is True for row in rows),
        "failed": failed,
        "skipped": sum("skipped" in row for row in rows),
    }
    whole = without_nan({**document, "summary": summary})
    out.with_name(out.name + ".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(_lines(document, rows, summary)) + "\n"
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")
    return failed


def _lines(document: Mapping[str, Any], rows: Sequence[Row], summary: Mapping[str, int]) -> Iterator[str]:
    def of(part: str) -> list[Row]:
        return [row for row in rows if row["part"] == part]

    yield f"**{document['machine']}**, `{document['command']}`, {document['seconds']:.0f} s."
    yield f"π₀.₅ ({document['config']}) with random weights, bfloat16; sampling at batch 1 with 10 Euler steps,"
    yield "training with float32 weights; medians. Targets are an H200's; floors are bfloat16's. Rows:"
    yield ", ".join(f"{count} {name}" for name, count in summary.items()) + "."
    for machine in (row for row in of("sampling") if "flops_per_second" in row):
        rates = machine["flops_per_second"] / 1e12, machine["bytes_per_second"] / 1e12
        yield f"Measured peak, from which floors and MFU are computed: {rates[0]:.0f} TFLOP/s, {rates[1]:.2f} TB/s."
    yield from ("", "### Checks", "", *_table(_CHECKS, _checks(rows)))
    sampling = [row for row in of("sampling") if "mode" in row]
    yield from ("", "### Sampling", "", *_table(_SAMPLING, sampling))
    yield from ("", "### Training", "", *_table(_TRAINING, of("training")))
    yield from ("", "### Loading", "", *_table(_LOADING, of("loading")), "", "### Launches per sampling", "")
    yield "Counted from the sizes, three cameras and 200 prompt tokens; views and allocations are none. Target of the"
    yield from (f"engine: at most {TARGET_LAUNCHES}.", "")
    for row in of("launches"):
        if "plain" in row:
            yield from launch_table(row["plain"]["by_operation"], row["engine"]["by_operation"])


def _checks(rows: Iterable[Row]) -> list[Row]:
    """Rows of failed and skipped checks of all parts."""
    named = [row for row in rows if is_failure(row) or "skipped" in row or "not_available" in row]
    for kind in ("kernels", "engine", "training checks"):
        passed = [row for row in rows if row["part"] == kind and row.get("passed")]
        if passed:
            worst = max(passed, key=lambda row: row["difference"] / row["tolerance"])
            named.append(
                {**worst, "check": f"{len(passed)} passed, of which the nearest to its tolerance: {worst['check']}"}
            )
    return named


def _table(columns: Mapping[str, Cell], rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a Markdown table; a row without figures has the reason in the last column."""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(cell(row).replace('|', '/') for cell in columns.values())} |"


def _number(key: str, pattern: str, scale: float = 1.0) -> Cell:
    return lambda row: pattern.format(row[key] if scale == 1 else row[key] * scale) if row.get(key) is not None else "–"


def _text(key: str) -> Cell:
    return lambda row: str(row.get(key, "–"))


def _reason(row: Row) -> str:
    if row.get("passed") is False and "error" not in row:
        return "FAILED"
    for key, label in (
        ("error", "FAILED: "),
        ("out_of_memory", "out of memory: "),
        ("skipped", "skipped: "),
        ("not_available", "not available: "),
    ):
        if key in row:
            return label + " ".join(str(row[key]).split())
    return "passed" if row.get("passed") else ""


def _target(row: Row) -> str:
    target = TARGET_MS.get((row["mode"], row.get("cameras", 0), row.get("tokens", 0)))
    return "–" if target is None or row.get("kind") != "plain" else f"≤ {target:g}"


def _shape(row: Row) -> str:
    return f"{row['cameras']} + {row['tokens']}" if "cameras" in row else "–"


def _samples_target(row: Row) -> str:
    target = TARGET_SAMPLES.get(row.get("batch", 0))
    return "–" if target is None else f"≥ {target:g}"


def _check_name(row: Row) -> str:
    if "check" in row:
        return str(row["check"])
    return ", ".join(str(row[key]) for key in ("mode", "cameras", "tokens", "kind", "batch", "what") if key in row)


_CHECKS: dict[str, Cell] = {
    "part": _text("part"),
    "check": _check_name,
    "difference": _number("difference", "{:.1e}"),
    "tolerance": _number("tolerance", "{:.1e}"),
    "result": _reason,
}
_SAMPLING: dict[str, Cell] = {
    "mode": _text("mode"),
    "kernels": _text("implementation"),
    "cameras + tokens": _shape,
    "kind": _text("kind"),
    "p50 ms": _number("p50_ms", "{:.2f}"),
    "target": _target,
    "p99 ms": _number("p99_ms", "{:.2f}"),
    "runs": _number("runs", "{}"),
    "floor ms": _number("floor_ms", "{:.2f}"),
    "ratio": _number("ratio", "{:.2f}"),
    "vision": _number("vision_ms", "{:.2f}"),
    "prefill": _number("prefill_ms", "{:.2f}"),
    "steps": _number("steps_ms", "{:.2f}"),
    "launches": _number("launches", "{}"),
    "GB": _number("peak_bytes", "{:.2f}", 1e-9),
    "prepared in s": _number("prepare_s", "{:.1f}"),
    "": _reason,
}
_TRAINING: dict[str, Cell] = {
    "batch": _text("batch"),
    "activation checkpointing": _text("checkpointing"),
    "compiled": _text("compiled"),
    "samples/s": _number("samples_per_second", "{:.1f}"),
    "target": _samples_target,
    "MFU": _number("mfu", "{:.0%}"),
    "ratio to floor": _number("ratio", "{:.2f}"),
    "peak GB": _number("peak_bytes", "{:.1f}", 1e-9),
    "plan GB": _number("plan_bytes", "{:.1f}", 1e-9),
    "": _reason,
}
_LOADING: dict[str, Cell] = {
    "what": _text("what"),
    "GB": _number("bytes", "{:.2f}", 1e-9),
    "seconds": _number("seconds", "{:.2f}"),
    "first time": _number("first_s", "{:.2f}"),
    "": _reason,
}
