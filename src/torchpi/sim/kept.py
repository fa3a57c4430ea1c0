"""Episodes of an evaluation in a folder, where they are kept as they end, so that an interrupted one goes on.

evaluation.json               the settings that decide an episode
episodes/<task>_<number>.json the outcome of each
.lock                         held by the evaluation that runs
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
def resumable(
    folder: pathlib.Path, actor: Actor, env: str, seed: int, rollout: Rollout, instructions: Mapping[str, str]
) -> Iterator[None]:
    """Keep other processes out of a folder, and note an evaluation's settings in it; an error if it has episodes of
    others, which are not to be mixed."""
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
        _begin_or_resume(folder, settings)
        yield


def _begin_or_resume(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    if (file := folder / "evaluation.json").exists():
        before = read_json_object(file, error=SimulationError)
        if changed := [name for name in {**settings, **before} if settings.get(name) != before.get(name)]:
            found = "; ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in changed)
            raise SimulationError(
                f"{folder} has episodes of an evaluation with {found}: they would be mixed. Choose another folder with "
                "--out, or delete this one."
            )
    else:
        if any((folder / "episodes").glob("*.json")):
            raise SimulationError(f"{folder} has episodes, but no {file.name} with their settings: choose another one.")
        write_json(file, settings)


def read_outcome(file: pathlib.Path) -> EpisodeOutcome:
    """The outcome of an episode that has ended."""
    try:
        return parse(EpisodeOutcome, read_json(file, error=SimulationError), str(file), error=SimulationError)
    except SimulationError as error:
        raise SimulationError(f"{error} Delete this file, and the same command runs the episode again.") from error
