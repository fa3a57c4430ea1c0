"""The folder of a training run, read as far as it is there.

train.json      the recipe
run.json        command, started and finished (ISO 8601), torchpi, torch, device, world_size; datasets, a list of
                mappings; parameters, a list of {part, trainable, frozen, without_gradient, dtype}; init, {source,
                loaded, fresh, left_out, adapted}
metrics.jsonl   see `torchpi.training.metrics`; "resumed": true marks the first line after a resume
plots           STEP_chunks.png and STEP_errors.png; those of the other robots of a mixture end in _ROBOT
checkpoints     STEP/policy
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.errors import MissingFileError
from torchpi.training.config import flat_options
from torchpi.training.metrics import METRICS, Line, parse_metrics, without_overtaken
from torchpi.training.state import checkpoints
from torchpi.ui.format import format_duration


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run's folder."""

    folder: pathlib.Path
    recipe: Mapping[str, Any]
    """Options in train.json, by name; empty: not there."""
    about: Mapping[str, Any]
    """run.json; empty: not there."""
    lines: Sequence[Line]
    """Lines of metrics.jsonl without those that a resume has made void."""
    resumes: Sequence[int]
    """Steps of the first lines after a resume."""
    checkpoints: Sequence[pathlib.Path]
    """Oldest first."""
    notes: Sequence[str]
    """Damage of the files."""

    @property
    def step(self) -> int:
        """The last step that is logged or saved."""
        saved = int(self.checkpoints[-1].name) if self.checkpoints else 0
        return max(saved, self.lines[-1]["step"] if self.lines else 0)

    @property
    def num_steps(self) -> int | None:
        """The recipe's number of steps."""
        found = self.recipe.get("num_steps")
        return found if isinstance(found, int) else None

    @property
    def source(self) -> Mapping[str, Any]:
        """The recipe's dataset and embodiment; of a mixture, the first ones."""
        mixture = self.recipe.get("mixture")
        return mixture[0] if isinstance(mixture, list) and mixture and isinstance(mixture[0], Mapping) else self.recipe

    @property
    def finished(self) -> bool:
        """True if all steps are done."""
        return self.num_steps is not None and self.step >= self.num_steps

    @property
    def duration(self) -> str | None:
        """Time from start to end; None: one of them is unknown."""
        try:
            started, finished = (datetime.datetime.fromisoformat(self.about[name]) for name in ("started", "finished"))
            return format_duration((finished - started).total_seconds())
        except (KeyError, TypeError, ValueError):  # missing, no date, or with and without a time zone
            return None

    def last(self, key: str) -> Any:
        """The last value of a key in the metrics; None: there is none."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    def last_mapping(self, key: str) -> Mapping[str, Any]:
        """The last value of a key in the metrics, by name; empty: there is none."""
        found = self.last(key)
        return found if isinstance(found, Mapping) else {}

    def plots(self) -> list[tuple[str, str, pathlib.Path]]:
        """The plots of the last step: kind (chunks or errors), robot (empty: the first one) and path of each."""
        last: dict[tuple[str, str], tuple[int, pathlib.Path]] = {}
        # Runs of earlier versions have them in pictures/.
        for path in (*self.folder.glob("plots/*.png"), *self.folder.glob("pictures/*.png")):
            if found := re.fullmatch(r"(\d+)_(chunks|errors)(?:_(.+))?\.png", path.name):
                key = (found[3] or "", found[2])
                last[key] = max(last.get(key, (-1, path)), (int(found[1]), path))
        return [(kind, robot, path) for (robot, kind), (_, path) in sorted(last.items())]


def read_run(run: pathlib.Path) -> Run:
    """Read a run's folder."""
    metrics = run / METRICS
    if not metrics.is_file() and not (run / "train.json").is_file():
        raise MissingFileError(f"{run} is no folder of a training run: neither train.json nor metrics.jsonl is in it.")
    notes: list[str] = []
    recipe, about = (_read_json(run / name, notes) for name in ("train.json", "run.json"))
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    lines, broken = parse_metrics(text)
    if broken:
        count = f"{len(broken)} lines" if len(broken) > 1 else "a line"
        notes.append(f"metrics.jsonl has {count} that cannot be read, first in line {broken[0]}; left out here.")
    went_back = [line["step"] for before, line in itertools.pairwise(lines) if line["step"] < before["step"]]
    lines = without_overtaken(lines)
    resumes = sorted({*went_back, *(line["step"] for line in lines if line.get("resumed"))})
    return Run(run, flat_options(recipe), about, lines, resumes, checkpoints(run), notes)


def _read_json(path: pathlib.Path, notes: list[str]) -> Mapping[str, Any]:
    """The document; empty, with a note, where it cannot be read, for example because the process was just writing."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, Mapping):
        notes.append(f"{path.name} is no JSON object.")
        return {}
    return found
