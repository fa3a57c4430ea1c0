"""Draft of a robot's embodiment file from a dataset, with comments for a person to answer."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torchpi.data.guesses import is_gripper
from torchpi.data.inspect import Dimension, Inspection
from torchpi.errors import DatasetError
from torchpi.robots import Embodiment
from torchpi.schema import COMMENT, without_comments

QUESTION = "QUESTION: "
"""Prefix of comments about something that the dataset does not state."""
_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"
_MEASURED = re.compile(rf"(correlation |change \(|which is |[:,] from ){_NUMBER}(?: to {_NUMBER})?")
"""Measured numbers in the reasons of guesses, see `torchpi.data.guesses`."""
_WRISTS = re.compile(r"wrist|hand|grip|ego", re.IGNORECASE)
_MODEL_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""Camera names of the published weights."""


def draft_embodiment(inspection: Inspection, name: str, *, horizon: int = 50) -> dict[str, Any]:
    """Draft an embodiment document: facts from the dataset, guesses, and questions as comments.

    At most half of a chunk is executed; the default `horizon` is that of most published weights.
    """
    if inspection.dataset is None:
        raise DatasetError(f"No episode of {inspection.path} can be read: {inspection.problems[0].text}")
    task, *more = inspection.tasks or ("",)
    document = {
        COMMENT: f"Drafted from {inspection.path} by `torchpi data draft`. Correct it where a comment begins with "
        f"{QUESTION.strip(': ')}; comments are not read. execute_steps is for chunks of {horizon} actions.",
        "name": name,
        "cameras": _cameras(inspection),
        "state": [_state(inspection.state)] if inspection.state else [],
        "actions": list(_actions(inspection)),
        "control_hz": inspection.fps,
        "execute_steps": max(1, min(horizon // 2, round(inspection.fps / 2))),
        "default_prompt": None if more or not task else task,
    }
    Embodiment.from_dict(without_comments(document), where=f"The draft from {inspection.path}").check_names()
    return document


def questions_of(document: Mapping[str, Any]) -> Iterator[str]:
    """The questions of a draft. Questions that differ only in measured numbers are merged, with the numbers' ranges."""
    for part in ("cameras", "state", "actions"):
        groups = defaultdict[str, dict[str, str]](dict)  # questions by row, grouped by their text without numbers
        for row in document[part]:
            if COMMENT in row:
                text = row[COMMENT].removeprefix(QUESTION)
                groups[_MEASURED.sub(r"\1", text)][row.get("name") or row["key"]] = text
        for texts in groups.values():
            names = "" if list(texts) == [part] else f" {', '.join(texts)}"  # the state's default key is "state"
            yield f"{part}{names}: {_with_ranges(list(texts.values()))}"


def _with_ranges(texts: list[str]) -> str:
    """Merge texts that differ only in measured numbers: each becomes the range of its values."""
    rows = zip(*(_MEASURED.finditer(text) for text in texts), strict=True)
    ranges = iter(
        [sorted({number for match in row for number in match.groups()[1:] if number}, key=float) for row in rows]
    )

    def merged(match: re.Match[str]) -> str:
        numbers = next(ranges)
        return match[1] + " to ".join(numbers[:: max(1, len(numbers) - 1)])

    return _MEASURED.sub(merged, texts[0])


def to_text(document: Mapping[str, Any]) -> str:
    """JSON with one line per camera, part of the state and dimension of the action."""
    encode = partial(json.dumps, ensure_ascii=False)
    parts = []
    for key, value in document.items():
        rows = ",\n".join(f"    {encode(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f"  {encode(key)}: " + (f"[\n{rows}\n  ]" if rows else encode(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(row: dict[str, Any], question: str) -> dict[str, Any]:
    return row | ({COMMENT: QUESTION + question} if question else {})


def _cameras(inspection: Inspection) -> list[dict[str, Any]]:
    """Assign cameras to the model's: wrist cameras, recognised by name, to wrist cameras, the others in order."""
    if all("depth" in camera.kind for camera in inspection.cameras):
        raise DatasetError(f"{inspection.path} has no camera that a policy could read; expected at least one.")
    free, rows = list(_MODEL_CAMERAS), []
    for camera in sorted(inspection.cameras, key=lambda camera: not _WRISTS.search(camera.key)):  # wrists first
        is_wrist, is_right = bool(_WRISTS.search(camera.key)), "right" in camera.key.lower()
        preferred = _MODEL_CAMERAS[1 + is_right :] if is_wrist else _MODEL_CAMERAS
        model_camera = next((name for name in preferred if name in free), None)
        row = {"name": None, "key": re.split(r"[./]", camera.key)[-1], "presence": "ignored"}
        question = ""
        if "depth" in camera.kind:
            near, far = camera.depths or (0.1, 2.0)
            question = (
                'should the model read this depth camera, with "presence": "required", "depth": '
                f'{{"near": {near:.2g}, "far": {far:.2g}}}? (docs/datasets.md)'
            )
        elif model_camera is None:
            question = "the model has three cameras; should it read this one?"
        else:
            free.remove(model_camera)
            row = {"name": model_camera, "key": row["key"]}
            if not is_wrist and model_camera != _MODEL_CAMERAS[0]:
                question = "another view of the scene instead of a wrist camera?"
        rows.append(_row(row, question))
    return sorted(rows, key=lambda row: (row["name"] is None, row["name"]))


def _state(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    uncertain = defaultdict[str, list[str]](list)
    for dim in dimensions:
        if not dim.unit.certain:
            uncertain[str(dim.unit)].append(dim.name)
    row = {"key": "state", "names": _unique_names(dimensions), "units": [dim.unit.value for dim in dimensions]}
    texts = "; ".join(f"{', '.join(names)} {unit}" for unit, names in uncertain.items())
    return _row(row, f"are these units right? {texts}" if uncertain else "")


def _actions(inspection: Inspection) -> Iterator[dict[str, Any]]:
    state_names, names = _unique_names(inspection.state), _unique_names(inspection.actions)
    for i, (dim, name) in enumerate(zip(inspection.actions, names, strict=True)):
        assert dim.command is not None
        base = name  # the dimension of the state that the action is relative to
        if name not in state_names and len(state_names) == len(names):
            base = state_names[i]
        is_joint = dim.unit.value in ("rad", "deg") and not is_gripper(name)
        is_delta = is_joint and dim.command.value == "position" and base in state_names[i : i + 1]
        guesses = {"command": dim.command, "unit": dim.unit}
        row = {"name": name, "unit": dim.unit.value, "kind": "delta" if is_delta else "absolute"}
        yield _row(
            {**row, "command": dim.command.value or None},
            "; ".join(f"{what} {guess}" for what, guess in guesses.items() if not guess.certain),
        )


def _unique_names(dimensions: Sequence[Dimension]) -> list[str]:
    """Names of the dimensions; repeated names are numbered."""
    names = [dim.name for dim in dimensions]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]
