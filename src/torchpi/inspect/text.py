"""Terminal output of traces, diagnoses and comparisons."""

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
_VIEWS = "view: joint, only in the papers' joint forward pass; cached, only in the model's own; blank, in both."
_KINDS = {"same": "dim", "size": "", "architecture": "bold"}
_LEVELS = {"problem": "bold red", "warning": "yellow", "note": "dim"}
_EPS_RULES = {"openpi": "1e-6 added to the divisor", "lerobot": "1e-8 added to std, or replacing a range of 0"}
_TRUNCATIONS = {"instruction": "the instruction is shortened", "original": "the end is cut"}


# ---- trace ----


def print_trace(trace: Trace, console: Console) -> None:
    """Print a header, a table per step, and facts about the model."""
    console.print(_header(trace))
    for step in STEPS:
        explanation = Text(f"     {step.explanation(trace.inputs.config.pi05)}", style="dim")
        console.print("", _title(step), explanation, _step_table(trace, step), sep="\n")
    console.print(f"\n{_VIEWS}")
    parameters = {f"  of these {name}": format_count(count) for name, count in trace.parameters.items()}
    rows = {name: text for part in (*facts(trace).values(), parameters) for name, text in part.items()}
    console.print("", grid((), rows.items()), sep="\n")
    if trace.values is not None:
        pairs = [(pair.what, f"{pair.max_abs:.1e}", f"{pair.scale:.3g}") for pair in trace.values.agreement]
        table = grid(("value, computed in two ways", "largest difference", "largest value"), pairs)
        console.print("", table, sep="\n")


def print_comparison(left: Trace, right: Trace, console: Console) -> None:
    """Print two models side by side: architecture, sizes, and the shapes in every step."""
    console.print(_header(left), _header(right), sep="\n")
    tables = [(Text(title, style="bold"), rows) for title, rows in compare_facts(left, right).items()]
    tables += [(_title(step), rows) for step, rows in zip(STEPS, compare_steps(left, right).values(), strict=True)]
    for title, rows in tables:
        cells = [[Text(cell, style=_KINDS[row.kind]) for cell in row] for row in rows]
        console.print("", title, grid(("", left.inputs.title, right.inputs.title), cells), sep="\n")
    console.print("\nbold: only one model has it. normal: the values differ. grey: the same in both.")


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
    """Table of a step's tensors: name, shape, dtype, statistics and formula."""
    stats_columns = Stats._fields if trace.values is not None else ()
    columns = ["     tensor", "shape", "dtype", *stats_columns, "formula", "view"]
    cells: list[tuple[str | Text, ...]] = []
    for row in rows_of(trace, step.id):
        label = Text.assemble(f"     {row.name}", (f" ×{row.repeats}" if row.repeats > 1 else "", "dim"))
        shape = repr(row.entry.value) if row.entry.dtype == "str" else row.shape
        stats = [format_number(value) for value in row.stats] if row.stats else [""] * len(stats_columns)
        formula, tag = Text(row.entry.formula, style="green"), Text(row.tag, style=_TAGS[row.tag])
        cells.append((label, shape.ljust(22), row.entry.dtype, *stats, formula, tag))
    return grid(columns, cells, right=range(3, 3 + len(stats_columns)))


# ---- doctor ----


def print_diagnosis(policy: Policy, diagnosis: Diagnosis, console: Console, *, title: str) -> None:
    """Print the description of the policy, tables about the observation, and findings."""
    console.print(Text(f"torchpi doctor {title}", style="bold"))
    rows = _describe(policy, diagnosis.policy)
    console.print(grid((), [(Text(name, style="dim"), value) for name, value in rows]))
    if diagnosis.observation is not None:
        for part in _observation_tables(diagnosis.observation):
            console.print("", part, sep="\n")
    findings = [(Text(f.level, style=_LEVELS[f.level]), f.about, f.message) for f in diagnosis.findings]
    console.print("", grid((), findings) if findings else Text("no findings", style="green"), sep="\n")


def _describe(policy: Policy, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows about a policy, from `diagnosis.describe`."""
    model = about["model"]
    dtype = about["dtype"] + (f" with {about['quantization']} matmuls" if about["quantization"] else "")
    yield "model", f"{about['variant']}, {large_count(about['parameters'])} parameters, {dtype} on {about['device']}"
    for name in ("paligemma", "action_expert", "siglip"):
        yield name, ", ".join(f"{field} {value}" for field, value in model[name].items())
    filter_, bars = about["image_transform"]["filter"].replace("_", ", "), about["image_transform"]["bars"]
    yield "images", f"{model['image_size']}×{model['image_size']} pixels, {filter_}, bars of {bars}"
    yield "robot", about["embodiment"] + (f", units converted by {about['hook']}" if about["hook"] else "")
    for i, camera in enumerate(about["cameras"]):
        source = "the robot has none" if camera["key"] is None else f"from {camera['key']}"
        yield "" if i else "cameras, in order", f"{camera['name'] or '(not read)'} {source}, {camera['presence']}"
    reads_state = about["state_input"] and about["state"]
    yield "state", f"{_names(about['state'])}; read as {about['state_input']}" if reads_state else "not read"
    yield "actions", _names(about["actions"])
    for key, rule in about["normalization"].items():
        yield f"normalization of {key}", f"{rule['kind']}, eps rule {rule['eps_rule']} ({_EPS_RULES[rule['eps_rule']]})"
    content = "instruction"
    if policy.transforms.discrete_state_input:
        state_dim = about["prompt_state_dim"]
        content += " and state" + (f" (padded with zeros to {state_dim} dimensions)" if state_dim else "")
    limit = "any number of" if about["max_token_len"] is None else f"at most {about['max_token_len']}"
    yield "prompt", f"{content} as text ({about['prompt_format']}'s format), {limit} tokens"
    yield "prompts that are too long", _TRUNCATIONS[about["truncation"]]
    yield "default prompt", "none" if about["default_prompt"] is None else repr(about["default_prompt"])
    horizon = "not stated" if about["action_horizon"] is None else f"{about['action_horizon']} actions"
    yield "horizon", horizon + (f", of which to execute {about['execute_steps']}" if about["execute_steps"] else "")
    yield "control rate", "not stated" if about["control_hz"] is None else f"{about['control_hz']} Hz"
    try:
        provenance = [(name, text) for name, text in describe_policy(policy) if name != "model"]
    except ValueError as error:
        provenance = [("provenance", str(error))]
    yield from provenance or [("provenance", "not stated")]


def _names(dims: Sequence[dict[str, str]]) -> str:
    notes = [", ".join(filter(None, (dim["unit"], dim.get("kind"), dim.get("command")))) for dim in dims]
    return ", ".join(_with_unit(dim["name"], note) for dim, note in zip(dims, notes, strict=True))


def _observation_tables(checks: ObservationCheck) -> Iterator[Table | Text]:
    cameras = [(c.name, c.key or "–", c.presence, "yes" if c.found else "no") for c in checks.cameras]
    yield grid(("camera", "key", "presence", "in the observation"), cameras)
    rows: list[tuple[str, ...]] = []
    if checks.state:
        for state in checks.state:
            outside = f"{state.excess:.3f} of the range" if state.outside else ""
            numbers = _numbers(state.value, state.low, state.high)
            rows.append((_with_unit(state.name, state.unit), *numbers, outside))
        yield grid(("state", "value", "1 %", "99 %", "outside by"), rows)
        yield Text(f"{checks.state_outside:.0%} of the state's dimensions are outside their range", style="dim")
    if prompt := checks.prompt:
        limit = "" if prompt.max_token_len is None else f" of {prompt.max_token_len}"
        yield Text(f"prompt: {prompt.num_tokens}{limit} tokens: {prompt.text!r}")
    if checks.actions:
        rows = []
        for action in checks.actions:
            outside = f"{action.outside:.0%}, by up to {action.excess:.3f}" if action.excess else ""
            numbers = _numbers(action.min, action.max, action.low, action.high)
            rows.append((_with_unit(action.name, action.unit), action.kind, *numbers, outside))
        yield grid(("action", "kind", "min", "max", "1 %", "99 %", "outside"), rows)
        note = "min, max: predicted actions. 1 %, 99 %: training data. All in the robot's units."
        yield Text(note, style="dim")
    if checks.sensitivity:
        changes = []
        for row in checks.sensitivity:
            moves = f"not tried: {row.untried}" if row.moves is None else f"{row.moves:.2f} of its spread"
            changes.append((row.input, row.change, Text(moves, style="bold" if row.is_ignored else "")))
        yield grid(("input", "change", "the chunk moves by"), changes)
        yield Text(
            f"spread: {checks.spread:.3f}, RMS over noise seeds in normalized units (the training range is 2 wide). "
            f"Below {IGNORED_BELOW}, an input counts as ignored.",
            style="dim",
        )


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _numbers(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.4g}" for value in values)


# ---- compare ----


def print_compared(comparison: Comparison, console: Console, *, title: str) -> None:
    """Print differing settings, a table of the stages, and the first stage that differs."""
    console.print(Text(title, style="bold"))
    if comparison.settings:
        console.print("\n  ".join(["settings that differ:", *comparison.settings]))
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
    return f"{same}, but settings differ." if comparison.settings else f"{same}."
