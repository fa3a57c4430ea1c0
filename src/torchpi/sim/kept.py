"""The folder in which an evaluation saves each episode's outcome, so that it can be resumed.

evaluation.json               the settings that determine the episodes
episodes/<task>_<number>.json the outcome of each
.lock                         held by the running evaluation
"""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock

from torchpi.atomic import make_folder
from torchpi.errors import SimulationError
from torchpi.schema import parse, read_json, read_json_object, write_json
from torchpi.sim import simulator
from torchpi.sim.actors import fingerprint
from torchpi.sim.rollout import Actor, EpisodeOutcome, Rollout


@contextlib.contextmanager
def evaluation_folder(
    folder: pathlib.Path, actor: Actor, env: str, seed: int, rollout: Rollout, instructions: Mapping[str, str]
) -> Iterator[None]:
    """Lock a folder, and write or compare the evaluation's settings in it.

    An error for a folder with episodes of other settings, or with another evaluation that is running.
    """
    packages = ("torchpi", "torch", "mujoco", simulator(env).package)
    settings: dict[str, Any] = {
        "policy": fingerprint(actor),
        "env": env,
        "seed": seed,
        **dataclasses.asdict(rollout),
        "instructions": dict(instructions),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    make_folder(folder)
    try:
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise SimulationError(
            f"Another process evaluates into {folder}; wait for its end, or choose another folder with --out."
        ) from error
    with lock:
        _write_or_compare(folder, settings)
        yield


def _write_or_compare(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    file = folder / "evaluation.json"
    if not file.exists():
        if any((folder / "episodes").glob("*.json")):
            raise SimulationError(f"{folder} has episodes, but no {file.name} with their settings: choose another one.")
        write_json(file, settings)
        return
    saved = read_json_object(file, error=SimulationError)
    if changed := [name for name in {**settings, **saved} if settings.get(name) != saved.get(name)]:
        differences = "; ".join(f"{name} {saved.get(name)}, now {settings.get(name)}" for name in changed)
        raise SimulationError(
            f"{folder} has episodes of an evaluation with {differences}: they would be mixed. Choose another folder "
            "with --out, or delete this one."
        )


def read_outcome(file: pathlib.Path) -> EpisodeOutcome:
    """Read the outcome of a finished episode."""
    try:
        return parse(EpisodeOutcome, read_json(file, error=SimulationError), str(file), error=SimulationError)
    except SimulationError as error:
        raise SimulationError(f"{error} Delete this file, and the same command runs the episode again.") from error
