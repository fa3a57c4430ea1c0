"""Names of files and columns in LeRobot's datasets, which the reader and the writer share."""

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
# v2.1 and v2.0: one file per episode. They differ in their statistics only, of which none are read.
TASKS_JSONL = "meta/tasks.jsonl"
EPISODES_JSONL = "meta/episodes.jsonl"

VERSIONS = ("v3.0", "v2.1", "v2.0")
CHUNKS_SIZE = 1000
"""Files in a folder."""

# One value per frame, beside state, action and images: their types in a data file.
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

NEW_IMAGES = "images_are_new"
"""A bool column of slow cameras: False in frames that repeat the images of an earlier one."""

LEAVE_OUT = "leave the episode out (--select, or episodes= in Python)"
"""The advice to go on without an episode, for errors."""

RECORDING_FOLDER = ".recording"
"""The folder of our writer's episodes until the dataset is finished; not a part of LeRobot's format."""
