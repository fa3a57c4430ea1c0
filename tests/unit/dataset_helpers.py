"""Datasets whose frames carry their number in the pixels, so that wrong frames are detected."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
from numbered_set import FRONT, draw, read_number

from torchpi.data import LeRobotDataset, LeRobotWriter
from torchpi.data.video import encode_video

NAMES = ["shoulder", "elbow", "gripper"]


def numbered_set(path, lengths=(5, 3, 4), *, first=0, fps=10, tasks=None, video=True, names=NAMES, **arguments):
    """Write a dataset; frame t of episode e has the number 1000 * (first + e) + t in its image, state and action."""
    arguments = {"robot_type": "my_arm", "state_names": names, "action_names": names, **arguments}
    with LeRobotWriter(path, fps=fps, cameras={"front": (64, 96, 3)}, video=video, **arguments) as writer:
        for e, length in enumerate(lengths):
            numbers = [1000 * (first + e) + t for t in range(length)]
            values = np.repeat(np.float32(numbers)[:, None], len(names), axis=1)
            frames = {FRONT: [draw(n) for n in numbers], "observation.state": values, "action": values}
            writer.add_episode(frames, (tasks or ["push it", "lift it"])[e % len(tasks or [1, 2])])
    return path


def encode_without_keyframes(path, fps=10):
    """Re-encode the videos of a dataset, each with a single keyframe and B-frames."""
    dataset = LeRobotDataset(path, action_horizon=1)
    for file in path.glob("videos/*/*/*.mp4"):
        images = [dataset[i][FRONT] for i in range(len(dataset))]
        encode_video(file, images, fps=fps, encoder="libx264", options={"g": 250, "bf": 3, "crf": 10})


def numbers_of(path):
    """The numbers of the frames by episode. Requires that image, state, action and bookkeeping agree."""
    dataset = LeRobotDataset(path, action_horizon=1)
    found = {}
    for i in range(len(dataset)):
        frame = dataset[i]
        state = int(frame["observation.state"][0])
        assert read_number(frame[FRONT]) == state == int(frame["action"][0, 0])
        numbers = found.setdefault(int(frame["episode_index"]), [])
        assert (frame["frame_index"], frame["index"]) == (len(numbers), i)
        assert abs(frame["timestamp"] - len(numbers) / dataset.fps) < 1e-6
        numbers.append(state)
    assert list(found) == list(range(len(found)))
    return list(found.values())


def change_info(path, **values):
    file = path / "meta/info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_rows(file, change):
    """Rewrite a Parquet file with the table that `change` returns."""
    pq.write_table(change(pq.read_table(file)), file)


def copied(path, to):
    shutil.copytree(path, to)
    return to
