"""A robot's description drafted from a dataset, for a person to correct: an embodiment file with comments."""

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
"""The beginning of a comment about something that the dataset does not tell."""
_MEASURED = re.compile(r"(correlation |change \(|which is |[:,] from )-?[\d.]+(?:e[+-]?\d+)?(?: to -?[\d.e+-]+)?")
"""Numbers in the reasons of guesses, see `torchpi.data.guesses`."""
_WRISTS = re.compile(r"wrist|hand|grip|ego", re.IGNORECASE)
_MODEL_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The cameras of the published weights."""


def draft_embodiment(found: Inspection, name: str, *, horizon: int = 50) -> dict[str, Any]:
    """The document of an embodiment file: what the dataset tells, guesses, and questions as comments.

    At most half of a chunk is executed; `horizon` is that of most published weights.
    """
    if found.dataset is None:
        raise DatasetError(f"No episode of {found.path} can be read: {found.problems[0].text}")
    task, *more = found.tasks or ("",)
    document = {
        COMMENT: f"Drafted from {found.path} by `torchpi data draft`. Correct it where a comment begins with "
        f"{QUESTION.strip(': ')}; comments are not read. execute_steps is for chunks of {horizon} actions.",
        "name": name,
        "cameras": _cameras(found),
        "state": [_state(found.state)] if found.state else [],
        "actions": list(_actions(found)),
        "control_hz": found.fps,
        "execute_steps": max(1, min(horizon // 2, round(found.fps / 2))),
        "default_prompt": None if more or not task else task,
    }
    Embodiment.from_dict(without_comments(document), where=f"The draft from {found.path}").check_names()
    return document


def questions_of(document: Mapping[str, Any]) -> Iterator[str]:
    """The questions in the document of a draft, each once with its places, and without measured numbers that differ."""
    for part in ("cameras", "state", "actions"):
        found = defaultdict[str, dict[str, str]](dict)
        for row in document[part]:
            if COMMENT in row:
                text = row[COMMENT].removeprefix(QUESTION)
                found[_MEASURED.sub(r"\1…", text)][row.get("name") or row["key"]] = text
        for general, texts in found.items():
            differing = set(texts.values())
            names = "" if list(texts) == [part] else f" {', '.join(texts)}"  # the usual state has the key "state"
            yield f"{part}{names}: {general if len(differing) > 1 else differing.pop()}"


def to_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each camera, part of the state and dimension of the action."""
    encode = partial(json.dumps, ensure_ascii=False)
    parts = []
    for key, value in document.items():
        rows = ",\n".join(f"    {encode(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f"  {encode(key)}: " + (f"[\n{rows}\n  ]" if rows else encode(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(row: dict[str, Any], question: str) -> dict[str, Any]:
    return row | ({COMMENT: QUESTION + question} if question else {})


def _cameras(found: Inspection) -> list[dict[str, Any]]:
    """The model's cameras: those on a wrist by their names, the others from the first on."""
    if all("depth" in camera.kind for camera in found.cameras):
        raise DatasetError(f"{found.path} has no camera that a policy could read; expected one at least.")
    free, rows = list(_MODEL_CAMERAS), []
    # Wrists choose first.
    for camera in sorted(found.cameras, key=lambda camera: not _WRISTS.search(camera.key)):
        is_wrist, is_right = bool(_WRISTS.search(camera.key)), "right" in camera.key.lower()
        wishes = _MODEL_CAMERAS[1 + is_right :] if is_wrist else _MODEL_CAMERAS
        row = {"name": None, "key": re.split(r"[./]", camera.key)[-1], "presence": "ignored"}
        place = next((place for place in wishes if place in free), None)
        if "depth" in camera.kind:
            near, far = camera.depths or (0.1, 2.0)
            question = (
                'is this depth camera to be read, as one of the model\'s, with "presence": "required", "depth": '
                f'{{"near": {near:.2g}, "far": {far:.2g}}}? (docs/datasets.md)'
            )
        elif place is None:
            question = "the model has three cameras; is this one to be read?"
        else:
            free.remove(place)
            row = {"name": place, "key": row["key"]}
            is_odd = not is_wrist and place != _MODEL_CAMERAS[0]
            question = "a further view of the scene in the place of a wrist camera?" if is_odd else ""
        rows.append(_row(row, question))
    return sorted(rows, key=lambda row: (row["name"] is None, row["name"]))


def _state(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    asked = defaultdict[str, list[str]](list)
    for dim in dimensions:
        if not dim.unit.certain:
            asked[str(dim.unit)].append(dim.name)
    row = {"key": "state", "names": _unique(dimensions), "units": [dim.unit.value for dim in dimensions]}
    texts = "; ".join(f"{', '.join(names)} {unit}" for unit, names in asked.items())
    return _row(row, f"are these units right? {texts}" if asked else "")


def _actions(found: Inspection) -> Iterator[dict[str, Any]]:
    states, names = _unique(found.state), _unique(found.actions)
    for i, (dim, name) in enumerate(zip(found.actions, names, strict=True)):
        assert dim.command is not None
        base = name if name in states else states[i] if len(states) == len(names) else None
        is_joint = dim.unit.value in ("rad", "deg") and not is_gripper(name)
        is_delta = is_joint and dim.command.value == "position" and base in states[i : i + 1]
        guesses = {"command": dim.command, "unit": dim.unit}
        row = {"name": name, "unit": dim.unit.value, "kind": "delta" if is_delta else "absolute"}
        yield _row(
            {**row, "command": dim.command.value or None},
            "; ".join(f"{what} {guess}" for what, guess in guesses.items() if not guess.certain),
        )


def _unique(dimensions: Sequence[Dimension]) -> list[str]:
    """The names, numbered where they occur more than once."""
    names = [dim.name for dim in dimensions]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]
