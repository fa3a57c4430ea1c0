"""A robot's description drafted from a dataset, for a person to correct: an embodiment file with comments."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchpi.data.guesses import is_gripper
from torchpi.data.inspect import Dimension, Inspection
from torchpi.errors import DatasetError
from torchpi.robots import Embodiment
from torchpi.schema import COMMENT, without_comments

QUESTION = "QUESTION: "
"""The beginning of a comment about something that the dataset does not tell."""
_WRISTS = re.compile(r"wrist|hand|grip|ego", re.IGNORECASE)
_MODEL_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The cameras of the published weights."""
_MAX_STEPS = 25
"""Half of the published weights' horizon."""


def draft_embodiment(found: Inspection, name: str) -> dict[str, Any]:
    """The document of an embodiment file: what the dataset tells, guesses, and questions as comments.

    Raises:
        ValueError: the dataset has no camera, or no episode that can be read.
    """
    if found.dataset is None:
        raise DatasetError(f"No episode of {found.path} can be read: {found.problems[0].text}")
    task, *more = found.tasks or ("",)
    document = {
        COMMENT: f"Drafted from {found.path} by `torchpi data draft`. Correct it where a comment begins with "
        f"{QUESTION.strip(': ')}; comments are not read.",
        "name": name,
        "cameras": _cameras(found),
        "state": [_state(found.state)] if found.state else [],
        "actions": list(_actions(found)),
        "control_hz": found.fps,
        "execute_steps": max(1, min(_MAX_STEPS, round(found.fps / 2))),
        "default_prompt": None if more or not task else task,
    }
    Embodiment.from_dict(without_comments(document), where=f"The draft from {found.path}").check_names()
    return document


def questions_of(document: Any, path: str = "") -> Iterator[str]:
    """The questions in a document, each with its place."""
    parts = (
        enumerate(document) if isinstance(document, list) else document.items() if isinstance(document, dict) else ()
    )
    for key, value in parts:
        if key == COMMENT and str(value).startswith(QUESTION):
            yield f"{path}: {value.removeprefix(QUESTION)}"
        name = value.get("name") or value.get("key") if isinstance(value, dict) else None
        yield from questions_of(value, f"{path} {name or key}".strip())


def to_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each camera, part of the state and dimension of the action."""

    def lines(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n  ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {lines(value)}" for key, value in document.items()) + "\n}\n"


def _cameras(found: Inspection) -> list[dict[str, Any]]:
    """The model's cameras: those on a wrist by their names, the others from the first on."""
    colour = [camera.key for camera in found.cameras if "depth" not in camera.kind]
    if not colour:
        raise DatasetError(f"{found.path} has no camera that a policy could read; expected one at least.")
    free, rows = list(_MODEL_CAMERAS), []
    for key in sorted(colour, key=lambda key: not _WRISTS.search(key)):  # wrists choose first
        place = next((place for place in free if place in _wishes(key)), None)
        row: dict[str, Any] = {"name": place, "key": re.split(r"[./]", key)[-1]}
        if place is None:
            row |= {"presence": "ignored", COMMENT: f"{QUESTION}the model has three cameras; is this one to be read?"}
        else:
            free.remove(place)
            if not _WRISTS.search(key) and place != _MODEL_CAMERAS[0]:
                row[COMMENT] = f"{QUESTION}a further view of the scene in the place of a wrist camera?"
        rows.append(row)
    for camera in found.cameras:
        if camera.key not in colour:
            near, far = camera.depths or (0.1, 2.0)
            mapping = f'"presence": "required", "depth": {{"near": {near:.2g}, "far": {far:.2g}}}'
            text = (
                f"{QUESTION}is this depth camera to be read, as one of the model's, with {mapping}? (docs/datasets.md)"
            )
            rows.append({"name": None, "key": re.split(r"[./]", camera.key)[-1], "presence": "ignored", COMMENT: text})
    return sorted(rows, key=lambda row: (row["name"] is None, row["name"]))


def _wishes(key: str) -> Sequence[str]:
    """The model's cameras that a camera may be, by its name."""
    if not _WRISTS.search(key):
        return _MODEL_CAMERAS
    return _MODEL_CAMERAS[2:] if "right" in key.lower() else _MODEL_CAMERAS[1:]


def _state(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    uncertain = [
        f"{dim.name} {dim.unit.value or 'unknown'} ({dim.unit.reason})" for dim in dimensions if not dim.unit.certain
    ]
    row = {"key": "state", "names": _unique(dimensions), "units": [dim.unit.value for dim in dimensions]}
    return row | ({COMMENT: f"{QUESTION}are these units right? {'; '.join(uncertain)}"} if uncertain else {})


def _actions(found: Inspection) -> Iterator[dict[str, Any]]:
    states = _unique(found.state)
    for i, (dim, name) in enumerate(zip(found.actions, _unique(found.actions), strict=True)):
        command = dim.command.value if dim.command else ""
        is_joint = dim.unit.value in ("rad", "deg") and not is_gripper(name)
        same_place = i < len(states) and (
            name == states[i] or (name not in states and len(states) == len(found.actions))
        )
        is_delta = is_joint and same_place and command == "position"
        row: dict[str, Any] = {
            "name": name,
            "unit": dim.unit.value,
            "kind": "delta" if is_delta else "absolute",
            "command": command or None,
        }
        asked = []
        if dim.command and not (dim.command.certain and command):
            asked.append(f"command {command or 'unknown'}: {dim.command.reason}")
        if not dim.unit.certain:
            asked.append(f"unit {dim.unit.value or 'unknown'}: {dim.unit.reason}")
        yield row | ({COMMENT: QUESTION + "; ".join(asked)} if asked else {})


def _unique(dimensions: Sequence[Dimension]) -> list[str]:
    """The names, numbered where they occur more than once."""
    names = [dim.name for dim in dimensions]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]
