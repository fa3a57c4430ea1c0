"""Convert a folder of ALOHA's HDF5 episodes to a LeRobot dataset, format v3.0.

    python scripts/aloha_hdf5_to_lerobot.py EPISODES OUT --task "put the pen into the cup"

EPISODES has episode_0.hdf5, episode_1.hdf5, … as written by ALOHA's recording script:

    /observations/qpos [T, 14]              left arm, gripper, right arm, gripper; the state
    /observations/images/CAMERA             uint8 [T, h, w, 3], or JPEG files [T, bytes], padded with zeros
    /action [T, 14]                         the leader arms' positions, in the same order

Everything else (qvel, effort, base_action) is left out, because π₀ does not read it. Needs the extra hdf5.
"""

import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from torchpi.data import LeRobotWriter
from torchpi.errors import counted
from torchpi.extras import require
from torchpi.robots import aloha
from torchpi.ui.progress import progress_bar

STATE, ACTION, IMAGES = "observations/qpos", "action", "observations/images"
DIMS = 14


@dataclasses.dataclass(frozen=True)
class Episode:
    """Checked file of an episode."""

    path: Path
    num_frames: int
    cameras: dict[str, tuple[int, int, int]]
    """Names and shapes of the images."""


def convert(folder: Path, out: Path, *, task: str, fps: int = 50, video: bool = True, robot_type: str = "aloha") -> int:
    """Convert all episodes of a folder.

    Args:
        folder: folder with episode_*.hdf5.
        out: folder of the dataset, new or empty.
        task: instruction for all episodes.
        fps: recorded frames per second.
        video: store cameras as video (small, lossy), otherwise as PNG (lossless).
        robot_type: robot type stated in the dataset.

    Returns:
        Number of episodes.

    Raises:
        FileNotFoundError: the folder has no episodes.
        ValueError: an episode is damaged or incomplete, or its cameras differ from the first one's.
    """
    episodes = [check_episode(path) for path in episode_files(folder)]  # check all files before writing
    first = episodes[0]
    for episode in episodes:
        if episode.cameras != first.cameras:
            raise ValueError(
                f"{episode.path} has the cameras {_described(episode)}, but {first.path.name} {_described(first)}; "
                "expected the same in all episodes. Convert them separately, or remove the file."
            )
    names = aloha().state_names
    writer = LeRobotWriter(
        out, fps=fps, cameras=first.cameras, state_names=names, action_names=names, robot_type=robot_type, video=video
    )
    with writer, progress_bar("converting", len(episodes)) as advance:
        for episode in episodes:
            for frame in frames(episode):
                writer.add_frame(frame)
            writer.save_episode(task)
            advance()
    return len(episodes)


def episode_files(folder: Path) -> list[Path]:
    """List the episode files in the order of their numbers."""
    numbered = [(re.fullmatch(r"episode_(\d+)\.hdf5", path.name), path) for path in folder.glob("*.hdf5")]
    found = sorted((int(match[1]), path) for match, path in numbered if match)
    if not found:
        raise FileNotFoundError(f"{folder} has no episode_*.hdf5; expected the folder of an ALOHA recording.")
    return [path for _, path in found]


def check_episode(path: Path) -> Episode:
    """Check an episode's content; only the first image of each camera is read."""
    with opened(path) as file:
        missing = [key for key in (STATE, ACTION, IMAGES) if key not in file]
        if missing or not len(file[IMAGES]):
            raise ValueError(
                f"{path} has no {', '.join(missing) or f'cameras in {IMAGES}'}; it has {', '.join(_keys(file))}."
            )
        lengths = {key: len(file[key]) for key in (STATE, ACTION)}
        lengths |= {f"{IMAGES}/{name}": len(values) for name, values in file[IMAGES].items()}
        if len(set(lengths.values())) > 1 or not lengths[ACTION]:
            raise ValueError(f"{path} has frames {lengths}; expected equal lengths of at least one.")
        for key in (STATE, ACTION):
            if file[key].shape[1:] != (DIMS,):
                raise ValueError(f"{path}: {key} is {list(file[key].shape)}; expected [T, {DIMS}], two arms.")
        cameras = {name: image(path, file, name, 0).shape for name in file[IMAGES]}
        return Episode(path, lengths[ACTION], cameras)


def frames(episode: Episode) -> Iterator[dict[str, Any]]:
    """Yield the frames for `LeRobotWriter.add_frame`."""
    with opened(episode.path) as file:
        for i in range(episode.num_frames):
            yield {
                "observation.state": read(episode.path, file, STATE, i),
                "action": read(episode.path, file, ACTION, i),
                **{f"observation.images.{name}": image(episode.path, file, name, i) for name in episode.cameras},
            }


def image(path: Path, file: Any, camera: str, i: int) -> np.ndarray:
    """Read an image, uint8 [h, w, 3]."""
    values = read(path, file, f"{IMAGES}/{camera}", i)
    if values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 3:
        return values
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(
            f"{path}: frame {i} of {camera} is {values.dtype} {list(values.shape)}; expected uint8 [h, w, 3], or the "
            "bytes of a JPEG file."
        )
    try:
        # A JPEG file marks its end, so the padding is harmless, and /compress_len, whose camera order is undocumented,
        # is not needed.
        with Image.open(io.BytesIO(values.tobytes()), formats=["JPEG"]) as jpeg:
            return np.array(jpeg.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: the JPEG of {camera} in frame {i} is damaged: {error}.") from error


def opened(path: Path) -> Any:
    """Open a file for reading."""
    h5py = require("h5py", "hdf5")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is truncated or not an HDF5 file: {error}.") from error


def read(path: Path, file: Any, key: str, i: int) -> np.ndarray:
    """Read one frame of an array."""
    try:
        return np.asarray(file[key][i])
    except OSError as error:
        raise ValueError(f"{path}: {key} can't be read in frame {i}; the file is damaged: {error}.") from error


def _keys(file: Any) -> list[str]:
    keys: list[str] = []
    file.visit(keys.append)
    return keys


def _described(episode: Episode) -> str:
    return ", ".join(f"{name} {height}x{width}" for name, (height, width, _) in episode.cameras.items())


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    task: str,
    fps: int = 50,
    video: bool = True,
) -> None:
    """Convert a folder of ALOHA's HDF5 episodes to a LeRobot dataset.

    Args:
        folder: folder with episode_0.hdf5, episode_1.hdf5, …
        out: folder of the dataset, new or empty.
        task: instruction for all episodes.
        fps: recorded frames per second.
        video: store cameras as video (small, lossy); --no-video: as PNG (lossless).
    """
    try:
        count = convert(folder, out, task=task, fps=fps, video=video)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"{counted(count, 'episode')}, written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
