"""Traces, diagnoses and comparisons on the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from torchpi.inspect.compare import Comparison
from torchpi.inspect.diagnosis import IGNORED_BELOW, Diagnosis, ObservationCheck
from torchpi.inspect.provenance import describe_policy
from torchpi.inspect.steps import STEPS, Step
from torchpi.inspect.summary import compare_facts, compare_steps, facts, rows_of
from torchpi.inspect.trace import Stats, Trace
from torchpi.policy import Policy
from torchpi.ui.format import format_count, format_number, format_shape, large_count
from torchpi.ui.tables import grid

_TAGS = {"joint": "magenta", "cached": "cyan", "training": "yellow", "": ""}
_KINDS = {"same": "dim", "size": "", "architecture": "bold"}
_LEVELS = {"problem": "bold red", "warning": "yellow", "note": "dim"}
_EPS_RULES = {"openpi": "1e-6 added to the divisor", "lerobot": "1e-8 added to std, or in place of a range of 0"}
_TRUNCATIONS = {"instruction": "the instruction is shortened", "original": "the end is cut"}


# ---- trace ----


def print_trace(trace: Trace, console: Console) -> None:
    """Header, a table per step, and the facts of the whole."""
    console.print(_header(trace))
    for step in STEPS:
        explanation = Text(f"     {step.explanation(trace.inputs.config.pi05)}", style="dim")
        console.print("", _title(step), explanation, _step_table(trace, step), sep="\n")
    parameters = {f"  of these {name}": format_count(count) for name, count in trace.parameters.items()}
    rows = {name: text for part in (*facts(trace).values(), parameters) for name, text in part.items()}
    console.print("", grid((), rows.items()), sep="\n")
    if trace.values is not None:
        pairs = [(pair.what, f"{pair.max_abs:.1e}", f"{pair.scale:.3g}") for pair in trace.values.agreement]
        table = grid(("two computations of the same", "largest difference", "largest value"), pairs)
        console.print("", table, sep="\n")


def print_comparison(left: Trace, right: Trace, console: Console) -> None:
    """Two models next to each other: architecture, sizes, and every step's shapes."""
    console.print(_header(left), _header(right), sep="\n")
    tables = [(Text(title, style="bold"), rows) for title, rows in compare_facts(left, right).items()]
    tables += [(_title(step), rows) for step, rows in zip(STEPS, compare_steps(left, right).values(), strict=True)]
    for title, rows in tables:
        cells = [[Text(cell, style=_KINDS[row.kind]) for cell in row] for row in rows]
        console.print("", title, grid(("", left.inputs.title, right.inputs.title), cells), sep="\n")
    console.print("\nbold: one model has it, and the other does not. normal: another size. grey: the same.")


def _header(trace: Trace) -> Panel:
    inputs = trace.inputs
    weights = "with weights" if trace.values is not None else "shapes without values (meta device)"
    lines = [f"{inputs.config.variant} · batch {len(inputs.noise)} · {trace.dtype} · {weights}"]
    if inputs.prompt is not None:
        lines.append(f"prompt: {inputs.prompt!r}")
    title = f"torchpi trace {inputs.title}"
    return Panel("\n".join([*lines, *inputs.notes]), title=title, title_align="left")


def _title(step: Step) -> Text:
    number = "" if step.id == "inference" else step.id
    return Text.assemble((f"{number:>4} ", "bold cyan"), (step.title, "bold"))


def _step_table(trace: Trace, step: Step) -> Table:
    """One line per row: name, shape, dtype, statistics, formula."""
    with_stats = trace.values is not None
    columns = ["     tensor", "shape", "dtype", *(Stats._fields if with_stats else ()), "formula", "view"]
    cells: list[tuple[str | Text, ...]] = []
    for row in rows_of(trace, step.id):
        label = Text.assemble(f"     {row.name}", (f" ×{row.repeats}" if row.repeats > 1 else "", "dim"))
        shape = repr(row.entry.value) if row.entry.dtype == "str" else row.shape
        stats = [format_number(value) for value in row.stats or ()] or [""] * len(Stats._fields) * with_stats
        formula, tag = Text(row.entry.formula, style="green"), Text(row.tag, style=_TAGS[row.tag])
        cells.append((label, shape.ljust(22), row.entry.dtype, *stats, formula, tag))
    return grid(columns, cells, right=range(3, 7) if with_stats else ())


# ---- doctor ----


def print_diagnosis(policy: Policy, diagnosis: Diagnosis, console: Console, *, title: str) -> None:
    """Description of the policy, tables of the observation, and findings."""
    console.print(Text(f"torchpi doctor {title}", style="bold"))
    console.print(grid((), [(Text(name, style="dim"), value) for name, value in _facts(policy, diagnosis.policy)]))
    if diagnosis.observation is not None:
        for part in _observation(diagnosis.observation):
            console.print("", part, sep="\n")
    rows = [(Text(f.level, style=_LEVELS[f.level]), f.about, f.message) for f in diagnosis.findings]
    console.print("", grid((), rows) if rows else Text("no findings", style="green"), sep="\n")


def _facts(policy: Policy, stated: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model, state_input = stated["model"], stated["state_input"]
    parameters = large_count(stated["parameters"])
    dtype = f"{stated['dtype']}{f' with {kind} matmuls' if (kind := stated['quantization']) else ''}"
    yield "model", f"{stated['variant']}, {parameters} parameters, {dtype} on {stated['device']}"
    for name in ("paligemma", "action_expert", "siglip"):
        yield name, ", ".join(f"{field} {value}" for field, value in model[name].items())
    filter_, bars = stated["image_transform"]["filter"].replace("_", ", "), stated["image_transform"]["bars"]
    yield "images", f"{model['image_size']}×{model['image_size']} pixels, {filter_}, bars of {bars}"
    yield "robot", stated["embodiment"] + (f", units converted by {stated['hook']}" if stated["hook"] else "")
    for i, camera in enumerate(stated["cameras"]):
        where = "the robot has none" if camera["key"] is None else f"from {camera['key']}"
        yield "" if i else "cameras, in order", f"{camera['name'] or '(not read)'} {where}, {camera['presence']}"
    yield (
        "state",
        f"{_names(stated['state'])}; read as {state_input}" if state_input and stated["state"] else "not read",
    )
    yield "actions", _names(stated["actions"])
    for key, rule in stated["normalization"].items():
        yield f"normalization of {key}", f"{rule['kind']}, eps rule {rule['eps_rule']} ({_EPS_RULES[rule['eps_rule']]})"
    length = "any number of" if stated["max_token_len"] is None else f"at most {stated['max_token_len']}"
    padded = f" (zeros up to {stated['prompt_state_dim']} dimensions)" if stated["prompt_state_dim"] else ""
    with_state = f"instruction and state{padded}" if policy.transforms.discrete_state_input else "instruction"
    yield "prompt", f"{with_state} as text ({stated['prompt_format']}'s format), {length} tokens"
    yield "prompts that are too long", _TRUNCATIONS[stated["truncation"]]
    yield "default prompt", "none" if stated["default_prompt"] is None else repr(stated["default_prompt"])
    horizon = stated["action_horizon"]
    executed = f", of which to execute {stated['execute_steps']}" if stated["execute_steps"] else ""
    yield "horizon", f"{'not stated' if horizon is None else f'{horizon} actions'}{executed}"
    yield "control rate", "not stated" if stated["control_hz"] is None else f"{stated['control_hz']} Hz"
    try:
        rows = [(name, text) for name, text in describe_policy(policy) if name != "model"]
    except ValueError as error:
        rows = [("provenance", str(error))]
    yield from rows or [("provenance", "not stated")]


def _names(dims: Sequence[dict[str, str]]) -> str:
    about = [", ".join(filter(None, (dim["unit"], dim.get("kind"), dim.get("command")))) for dim in dims]
    return ", ".join(_with_unit(dim["name"], text) for dim, text in zip(dims, about, strict=True))


def _observation(checks: ObservationCheck) -> Iterator[Table | Text]:
    rows = [(c.name, c.key or "–", c.presence, "yes" if c.found else "no") for c in checks.cameras]
    yield grid(("camera", "key", "presence", "in the observation"), rows)
    if checks.state:
        state = [
            (
                _with_unit(row.name, row.unit),
                *_numbers(row.value, row.low, row.high),
                f"{row.excess:.3f} of the range" if row.outside else "",
            )
            for row in checks.state
        ]
        yield grid(("state", "value", "1 %", "99 %", "outside by"), state)
        yield Text(f"{checks.state_outside:.0%} of the state's dimensions are outside of their range", style="dim")
    if prompt := checks.prompt:
        most = "" if prompt.max_token_len is None else f" of {prompt.max_token_len}"
        yield Text(f"prompt: {prompt.num_tokens}{most} tokens: {prompt.text!r}")
    if checks.actions:
        actions = [
            (
                _with_unit(row.name, row.unit),
                row.kind,
                *_numbers(row.min, row.max, row.low, row.high),
                f"{row.outside:.0%}, by up to {row.excess:.3f}" if row.excess else "",
            )
            for row in checks.actions
        ]
        yield grid(("action", "kind", "min", "max", "1 %", "99 %", "outside"), actions)
        note = "min, max: of the predicted actions. 1 %, 99 %: of the training data, both in the robot's units."
        yield Text(note, style="dim")
    if checks.sensitivity:
        changes = []
        for row in checks.sensitivity:
            moves = f"not tried: {row.untried}" if row.moves is None else f"{row.moves:.2f} of its spread"
            changes.append((row.input, row.change, Text(moves, style="bold" if row.is_ignored else "")))
        yield grid(("input", "change", "the chunk moves by"), changes)
        yield Text(
            f"spread: {checks.spread:.3f}, RMS over noise seeds in normalized units (the training range is 2 long). "
            f"Below {IGNORED_BELOW} an input counts as ignored.",
            style="dim",
        )


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _numbers(*values: float) -> list[str]:
    return [f"{value:.4g}" for value in values]


# ---- compare ----


def print_compared(comparison: Comparison, console: Console, *, title: str) -> None:
    """Differing settings, a table of the stages, and the first one that differs."""
    console.print(Text(title, style="bold"))
    if comparison.settings:
        console.print("\n  ".join(["their settings differ:", *comparison.settings]))
    rows: list[tuple[str | Text, ...]] = []
    for stage in comparison.stages:
        numbers = ["" if value is None else f"{value:.3g}" for value in (stage.max_abs, stage.scale)]
        shape = "" if stage.shape is None else format_shape(stage.shape)
        verdict = (f"differs: {stage.message}" if stage.message else "differs") if stage.differs else "same"
        rows.append((stage.name, shape, *numbers, Text(verdict, style="bold red" if stage.differs else "dim")))
    console.print(grid(("stage", "shape", "largest difference", "scale", ""), rows, right=(2, 3)))
    for line in comparison.stopped:
        console.print(Text(line, style="bold red"))
    console.print(_conclusion(comparison))


def _conclusion(comparison: Comparison) -> str:
    if comparison.first_difference is not None:
        return f"The first stage that differs is: {comparison.first_difference}."
    if comparison.stopped:
        return "Every stage that both reached is the same."
    same = f"Every stage is the same, within {comparison.tolerance:g} of its scale"
    return f"{same}; their settings differ." if comparison.settings else f"{same}."
