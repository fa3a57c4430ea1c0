"""A diagnosis for people."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchpi.demo.provenance import describe_policy
from torchpi.doctor.result import Diagnosis, ObservationCheck
from torchpi.doctor.sensitivity import IGNORED_BELOW
from torchpi.policy import Policy
from torchpi.ui.format import large_count

_EPS_RULES = {"openpi": "1e-6 added to the divisor", "lerobot": "1e-8 added to std, or in place of a range of 0"}
_TRUNCATIONS = {"instruction": "the instruction is shortened", "original": "the end is cut"}
_STYLES = {"problem": "bold red", "warning": "yellow", "note": "dim"}


def print_diagnosis(policy: Policy, diagnosis: Diagnosis, console: Console, *, title: str) -> None:
    """What the policy is, what the observation shows, and the findings."""
    console.print(Text(f"torchpi doctor {title}", style="bold"))
    table = _table("", "")
    table.show_header = False
    for name, value in _facts(policy, diagnosis):
        table.add_row(Text(name, style="dim"), value)
    console.print(table)
    if diagnosis.observation is not None:
        for part in _observation_tables(diagnosis.observation):
            console.print()
            console.print(part)
    console.print()
    console.print(_findings(diagnosis))


def _facts(policy: Policy, diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    said = diagnosis.policy
    model, state_input = said["model"], said["state_input"]
    parameters = large_count(said["parameters"])
    yield "model", f"{said['variant']}, {parameters} parameters, {said['dtype']} on {said['device']}"
    for name in ("paligemma", "action_expert", "siglip"):
        yield name, ", ".join(f"{field} {value}" for field, value in model[name].items())
    yield "images", f"{model['image_size']}×{model['image_size']} pixels"
    yield "robot", said["embodiment"] + (f", units converted by {said['hook']}" if said["hook"] else "")
    for i, camera in enumerate(said["cameras"]):
        where = "the robot has none" if camera["key"] is None else f"from {camera['key']}"
        yield "" if i else "cameras, in order", f"{camera['name'] or '(not read)'} {where}, {camera['presence']}"
    yield "state", f"{_names(said['state'])}; read as {state_input}" if state_input else "not read"
    yield "actions", _names(said["actions"])
    for key, rule in said["normalization"].items():
        yield f"normalization of {key}", f"{rule['kind']}, eps rule {rule['eps_rule']} ({_EPS_RULES[rule['eps_rule']]})"
    length = "any number of" if said["max_token_len"] is None else f"at most {said['max_token_len']}"
    with_state = "instruction and state" if policy.transforms.discrete_state_input else "instruction"
    yield "prompt", f"{with_state} as text ({said['prompt_format']}'s format), {length} tokens"
    yield "prompts that are too long", _TRUNCATIONS[said["truncation"]]
    yield "default prompt", "none" if said["default_prompt"] is None else repr(said["default_prompt"])
    horizon = said["action_horizon"]
    executed = f", of which to execute {said['execute_steps']}" if said["execute_steps"] else ""
    yield "horizon", f"{'not stated' if horizon is None else f'{horizon} actions'}{executed}"
    yield "control rate", "not stated" if said["control_hz"] is None else f"{said['control_hz']} Hz"
    yield from _provenance(policy)


def _names(dims: list[dict[str, str]]) -> str:
    def about(dim: dict[str, str]) -> str:
        more = ", ".join(part for part in (dim["unit"], dim.get("kind", "")) if part)
        return f"{dim['name']} ({more})" if more else dim["name"]

    return ", ".join(about(dim) for dim in dims)


def _provenance(policy: Policy) -> list[tuple[str, str]]:
    try:
        rows = [(name, text) for name, text in describe_policy(policy) if name != "model"]
    except ValueError as error:
        rows = [("provenance", str(error))]
    return rows or [("provenance", "not stated")]


def _observation_tables(checks: ObservationCheck) -> Iterator[Table | Text]:
    cameras = _table("camera", "key", "presence", "in the observation")
    for camera in checks.cameras:
        cameras.add_row(camera.name, camera.key or "–", camera.presence, "yes" if camera.found else "no")
    yield cameras
    if checks.state:
        state = _table("state", "value", "1 %", "99 %", "outside by")
        for row in checks.state:
            outside = f"{row.excess:.3f} of the range" if row.outside else ""
            state.add_row(_with_unit(row.name, row.unit), *_numbers(row.value, row.low, row.high), outside)
        yield state
        yield Text(f"{checks.state_outside:.0%} of the state's dimensions are outside of their range", style="dim")
    if checks.prompt is not None:
        prompt = checks.prompt
        most = "" if prompt.max_token_len is None else f" of {prompt.max_token_len}"
        yield Text(f"prompt: {prompt.num_tokens}{most} tokens: {prompt.text!r}")
    if checks.actions:
        actions = _table("action", "kind", "min", "max", "1 %", "99 %", "outside")
        for action in checks.actions:
            numbers = _numbers(action.min, action.max, action.low, action.high)
            outside = f"{action.outside:.0%}, by up to {action.excess:.3f}" if action.excess else ""
            actions.add_row(_with_unit(action.name, action.unit), action.kind, *numbers, outside)
        yield actions
        yield Text(
            "min, max: of the predicted actions. 1 %, 99 %: of the training data, both in the robot's units.",
            style="dim",
        )
    if checks.sensitivity:
        table = _table("input", "change", "the chunk moves by")
        for entry in checks.sensitivity:
            moves = f"not tried: {entry.untried}" if entry.moves is None else f"{entry.moves:.2f} of its spread"
            ignored = entry.moves is not None and entry.moves < IGNORED_BELOW
            table.add_row(entry.input, entry.change, Text(moves, style="bold" if ignored else ""))
        yield table
        yield Text(
            f"spread: {checks.spread:.3f}, RMS over noise seeds in normalized units (the training range is 2 long). "
            f"Below {IGNORED_BELOW} an input counts as ignored.",
            style="dim",
        )


def _findings(diagnosis: Diagnosis) -> Text | Table:
    if not diagnosis.findings:
        return Text("nothing to complain about", style="green")
    table = _table("", "", "")
    table.show_header = False
    for finding in diagnosis.findings:
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(level, finding.about, finding.message)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _numbers(*values: float) -> list[str]:
    return [f"{value:.4g}" for value in values]
