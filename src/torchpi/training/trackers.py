"""Trackers of a run: TensorBoard and Weights & Biases.

Both continue their curves when a run is resumed. TensorBoard drops the steps after the checkpoint; Weights & Biases
can't delete them, so its curves show these steps twice.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from torchpi.errors import TrainingError
from torchpi.extras import require


class _TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

    package = "torch.utils.tensorboard", "data"

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> None:
        # TensorBoard then ignores events of older files from this step on.
        purge_step = resume_step + 1 if resume_step else None
        self._writer: Any = require(*self.package).SummaryWriter(str(run / "tensorboard"), purge_step=purge_step)
        document = json.dumps(config, indent=2, ensure_ascii=False)
        self._writer.add_text("recipe", f"```json\n{document}\n```", resume_step)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run must not lose what it has logged

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        with Image.open(path) as opened:
            self._writer.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, with files in RUN/wandb and settings from WANDB_PROJECT, WANDB_MODE and so on.

    With WANDB_MODE=offline nothing leaves the machine until `wandb sync RUN/wandb/offline-run-*`.
    """

    package = "wandb", "track"

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> None:
        self._wandb: Any = require(*self.package)
        name = run / "wandb" / "run_id"  # at Weights & Biases, which a resumed run needs again
        if not resume_step or not name.is_file():  # a tracker may be added in the middle of a run
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        try:
            self._run: Any = self._wandb.init(
                project=config.get("wandb_project") or os.environ.get("WANDB_PROJECT", "torchpi"),
                name=config.get("wandb_name") or os.environ.get("WANDB_NAME", run.resolve().name),
                id=name.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(run),
                config=dict(config),
                # Console output is not uploaded: it contains every redraw of the progress bar.
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.errors.Error as error:
            raise TrainingError(
                f"Weights & Biases does not start: {error} Log in with wandb login, or work without the network: "
                "WANDB_MODE=offline."
            ) from error
        # wandb's own step can only grow: it would drop the lines of a run that was resumed at an earlier step.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def require_trackers(names: Sequence[str]) -> None:
    """Raise an error for unknown trackers and missing packages."""
    if unknown := sorted(set(names) - set(TRACKERS)):
        raise TrainingError(f"There is no tracker {', '.join(unknown)}; choose from {', '.join(TRACKERS)}.")
    for name in names:
        require(*TRACKERS[name].package)


class Trackers:
    """All trackers of a run."""

    def __init__(self, names: Sequence[str], run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> None:
        """
        Args:
            names: names of `TRACKERS`; may be empty.
            run: the run folder, for the trackers' files.
            config: the recipe, which the trackers show with the metrics.
            resume_step: step of the checkpoint that a run is resumed from; 0 for a new run.
        """
        require_trackers(names)
        self.open: list[_TensorBoard | _WandB] = []
        try:
            for name in dict.fromkeys(names):
                self.open.append(TRACKERS[name](run, config, resume_step))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log numbers by name at a step; names with a "/" are shown in groups."""
        for tracker in self.open:
            tracker.log(step, values)

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Log an image file at a step."""
        for tracker in self.open:
            tracker.image(step, name, path)

    def close(self) -> None:
        """Write pending data and end the trackers."""
        while self.open:
            self.open.pop().close()
