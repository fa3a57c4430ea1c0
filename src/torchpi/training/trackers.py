"""Where a run can be watched beside its own folder: TensorBoard, and Weights & Biases.

Both follow a run over its interruptions: TensorBoard forgets what lies behind the step that is gone on from; Weights &
Biases keeps it, as points at steps that come twice, because its servers take nothing back.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from torchpi.errors import TrainingError
from torchpi.extras import require

Number = float | int


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers and pictures of a run."""

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        """Numbers at a step, by name; "/" in a name makes groups."""

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """An image file at a step."""

    def close(self) -> None:
        """Write what is still held; nothing can be logged behind it."""


def open_trackers(names: Sequence[str], run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
    """The trackers of these names as one; without names it does nothing.

    Args:
        names: of `TRACKERS`.
        run: the run's folder, in which they keep their files.
        config: the recipe, which is shown beside the numbers.
        resume_step: the last step that holds in a run that is gone on with; 0: a new run.
    """
    require_trackers(names)
    trackers = _Trackers()
    try:
        for name in dict.fromkeys(names):
            trackers.members.append(TRACKERS[name](run, config, resume_step))
    except BaseException:
        trackers.close()
        raise
    return trackers


def require_trackers(names: Sequence[str]) -> None:
    """Raise what `open_trackers` would raise for a name that is unknown or a package that is missing."""
    if unknown := sorted(set(names) - set(TRACKERS)):
        raise TrainingError(f"There is no tracker {', '.join(unknown)}; choose from {', '.join(TRACKERS)}.")
    for name in names:
        _import(name)


def _import(tracker: str) -> Any:
    return require(*{"tensorboard": ("torch.utils.tensorboard", "data"), "wandb": ("wandb", "track")}[tracker])


class _Trackers:
    """Several trackers as one."""

    def __init__(self) -> None:
        self.members: list[Tracker] = []

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        for member in self.members:
            member.log(step, values)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        for member in self.members:
            member.picture(step, name, path)

    def close(self) -> None:
        while self.members:
            self.members.pop().close()


class _TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> None:
        # Readers drop the events from purge_step on that are in older files.
        purge_step = resume_step + 1 if resume_step else None
        self._writer: Any = _import("tensorboard").SummaryWriter(str(run / "tensorboard"), purge_step=purge_step)
        document = json.dumps(config, indent=2, ensure_ascii=False)
        self._writer.add_text("recipe", f"```json\n{document}\n```", resume_step)

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a run that is killed leaves what it has logged

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases; its files are in RUN/wandb, its settings come from WANDB_PROJECT, WANDB_MODE, ….

    With WANDB_MODE=offline nothing leaves the machine until `wandb sync RUN/wandb/offline-run-*`.
    """

    def __init__(self, run: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> None:
        self._wandb: Any = _import("wandb")
        try:
            self._run: Any = self._wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else "torchpi",
                name=run.resolve().name,
                id=_wandb_id(run, new=not resume_step),
                resume="allow",
                dir=str(run),
                config=dict(config),
                # What is printed stays here: it is drawn over and over by the progress bar.
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.errors.Error as error:
            raise TrainingError(
                f"Weights & Biases does not start: {error} Log in with: wandb login; or work without the network: "
                "WANDB_MODE=offline."
            ) from error
        # wandb's own step only grows, and it would drop what a run that has gone back logs.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run: pathlib.Path, *, new: bool) -> str:
    """The run's name at Weights & Biases, which a resumed run needs again."""
    file = run / "wandb" / "run_id"
    if new or not file.is_file():  # a run may be watched from its middle on
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return file.read_text(encoding="utf-8")


TRACKERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}
"""By name."""
