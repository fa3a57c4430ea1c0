"""Where a data set is: a folder, or the Hugging Face Hub, of which the files that are needed come into the cache."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torchpi.data.metadata import Episode, Metadata, read_metadata
from torchpi.errors import DatasetError

_HUB = "hf://"


def open_metadata(path: str | Path, *, rename: Mapping[str, str] | None = None) -> Metadata:
    """What a data set says of itself; the folder `meta` of an address is fetched first.

    Args:
        path: a folder, or hf://org/name[@revision].
        rename: from names of columns and cameras to LeRobot's, see `LeRobotDataset`.
    """
    return read_metadata(_with_meta(path)).with_names(rename or {})


def _with_meta(path: str | Path) -> Path:
    """The folder, in which `meta` is complete."""
    text = str(path)
    if text.startswith(_HUB):
        from torchpi.checkpoints.hub import fetch_dataset  # brings huggingface_hub

        return fetch_dataset(text, ["meta/"])
    if text.startswith(("hf:/", "gs:/", "s3:/", "http:/", "https:/")):  # a Path makes one slash of two
        raise DatasetError(f"A data set is a folder or hf://org/name[@revision], as a text; found {path!r}.")
    return Path(path).expanduser()


def fetch_frames(path: str | Path, episodes: Iterable[Episode], cameras: Collection[str]) -> None:
    """Get what is missing of some episodes and cameras of an address; of a folder nothing is missing."""
    if not str(path).startswith(_HUB):
        return
    from torchpi.checkpoints.hub import fetch_dataset

    files = set()
    for episode in episodes:
        files |= {episode.data_file, *(span.path for key, span in episode.videos.items() if key in cameras)}
    root = fetch_dataset(str(path), ["meta/"])
    fetch_dataset(str(path), [file.relative_to(root).as_posix() for file in sorted(files)])
