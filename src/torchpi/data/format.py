"""Names of files and columns in LeRobot's format."""

STATE = "observation.state"
ACTION = "action"
IMAGES = "observation.images."

INFO = "meta/info.json"
STATS = "meta/stats.json"
# v3.0: several episodes per file.
TASKS_PARQUET = "meta/tasks.parquet"
EPISODES_FOLDER = "meta/episodes"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# v2.1 and v2.0: one file per episode. They differ only in their statistics, which are not read.
TASKS_JSONL = "meta/tasks.jsonl"
EPISODES_JSONL = "meta/episodes.jsonl"

VERSIONS = ("v3.0", "v2.1", "v2.0")
CHUNKS_SIZE = 1000
"""Maximum number of files per folder."""

# Columns of every dataset with one value per frame, and their types in a data file.
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

NEW_IMAGES = "images_are_new"
"""Bool column for slow cameras: False in frames that repeat the images of an earlier frame."""


def leave_out(episodes: str) -> str:
    """Advice for error messages: how to continue without some episodes."""
    return f"leave {episodes} out (--select, or episodes= in Python)"


LEAVE_OUT = leave_out("the episode")


RECORDING_FOLDER = ".recording"
"""Folder of the episodes of an unfinished recording. torchpi's own, not part of LeRobot's format."""
