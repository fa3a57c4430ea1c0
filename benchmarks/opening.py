"""Time of opening a large dataset: 20 000 episodes with two cameras, generated from random numbers and a small video.

python benchmarks/opening.py [--episodes 20000] [--length 50] [--files 40] [--version v3.0] [--repeats 3]
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
import time
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.data.video import default_encoder, encode_video

CAMERAS = ("observation.images.base", "observation.images.wrist")
FPS = 30


@dataclasses.dataclass(frozen=True)
class Opening:
    """Generated dataset, and the number of timed runs."""

    episodes: int = 20_000
    """Number of episodes; a multiple of files."""
    length: int = 50
    """Frames per episode."""
    files: int = 40
    """Data files, and videos per camera, in format v3.0; v2.1 has one per episode."""
    version: Literal["v3.0", "v2.1"] = "v3.0"
    """Format of the dataset."""
    repeats: int = 3
    """Timed runs; the median is reported."""

    def run(self) -> None:
        """Print wall-clock and CPU seconds of opening the dataset and of checking its videos."""
        with tempfile.TemporaryDirectory() as folder:
            root = write_dataset(pathlib.Path(folder) / "set", self)
            rounds = []
            for _ in range(self.repeats):
                clocks = [(time.perf_counter(), time.process_time())]
                dataset = LeRobotDataset(root, action_horizon=50)
                clocks.append((time.perf_counter(), time.process_time()))
                dataset.check_videos()
                clocks.append((time.perf_counter(), time.process_time()))
                rounds.append(np.diff(clocks, axis=0).ravel())
        opened, opened_cpu, checked, checked_cpu = np.median(rounds, axis=0)
        print(
            f"{self.version}, {self.episodes} episodes of {self.length} frames, {len(CAMERAS)} cameras: opened in "
            f"{opened:.2f} s (CPU {opened_cpu:.2f} s), videos checked in {checked:.2f} s (CPU {checked_cpu:.2f} s)"
        )


def write_dataset(root: pathlib.Path, sizes: Opening) -> pathlib.Path:
    """Write the dataset; all videos are copies of a single one."""
    (root / "meta").mkdir(parents=True)
    is_v3 = sizes.version == "v3.0"
    files = sizes.files if is_v3 else sizes.episodes
    per_file = sizes.episodes // files
    video = root.parent / "video.mp4"
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    encode_video(video, [image] * (per_file * sizes.length), fps=FPS, encoder=default_encoder())
    info = {
        "codebase_version": sizes.version,
        "fps": FPS,
        "features": {
            **{key: {"dtype": "video", "shape": [32, 32, 3]} for key in CAMERAS},
            **{key: {"dtype": "float32", "shape": [7]} for key in (lerobot.STATE, lerobot.ACTION)},
        },
        "data_path": lerobot.DATA_PATH if is_v3 else "data/chunk-{episode_chunk:03d}/{episode_index:06d}.parquet",
        "video_path": lerobot.VIDEO_PATH if is_v3 else "videos/{episode_chunk:03d}/{video_key}/{episode_index:06d}.mp4",
    }
    (root / lerobot.INFO).write_text(json.dumps(info))
    rows = []
    for file in range(files):
        names = {"chunk_index": 0, "file_index": file, "episode_chunk": file // 1000, "episode_index": file}
        path = root / info["data_path"].format(**names)
        path.parent.mkdir(parents=True, exist_ok=True)
        episodes = np.arange(file * per_file, (file + 1) * per_file)
        pq.write_table(_table(episodes, sizes.length), path)
        for key in CAMERAS:
            target = root / info["video_path"].format(**names, video_key=key)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(video, target)
        for position, episode in enumerate(episodes.tolist()):
            row = {"episode_index": episode, "tasks": ["stand"], "length": sizes.length}
            start = position * sizes.length / FPS
            for part in ("data", *(f"videos/{key}" for key in CAMERAS)) if is_v3 else ():
                row |= {f"{part}/chunk_index": 0, f"{part}/file_index": file}
            row |= {f"videos/{key}/from_timestamp": start for key in CAMERAS} if is_v3 else {}
            rows.append(row)
    if is_v3:
        path = root / lerobot.EPISODES_PATH.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        pq.write_table(pa.table({"task_index": [0], "task": ["stand"]}), root / lerobot.TASKS_PARQUET)
    else:
        (root / lerobot.EPISODES_JSONL).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (root / lerobot.TASKS_JSONL).write_text('{"task_index": 0, "task": "stand"}\n')
    return root


def _table(episodes: np.ndarray, length: int) -> pa.Table:
    count = len(episodes) * length
    values = np.random.default_rng(int(episodes[0])).normal(size=(count, 7)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
    frame = np.tile(np.arange(length), len(episodes))
    return pa.table(
        {
            lerobot.STATE: vectors,
            lerobot.ACTION: vectors,
            "timestamp": (frame / FPS).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.repeat(episodes, length),
            "index": episodes[0] * length + np.arange(count),
            "task_index": np.zeros(count, np.int64),
        }
    )


if __name__ == "__main__":
    tyro.cli(Opening).run()
