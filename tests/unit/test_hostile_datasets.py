"""Untrusted datasets: nothing outside their folders is read, and nothing in them can exhaust the memory."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_helpers import change_info, change_rows, numbered_set
from numbered_set import FRONT

from torchpi.cli import _extract_allowed_folders
from torchpi.data import LeRobotDataset, video
from torchpi.data.files import ALLOW_OUTSIDE, open_parquet, read_table
from torchpi.data.metadata import open_metadata
from torchpi.data.video import VideoReader, encode_video
from torchpi.errors import DatasetError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return numbered_set(tmp_path_factory.mktemp("sets") / "set", video=False)


@pytest.fixture
def dataset(original, tmp_path):
    return shutil.copytree(original, tmp_path / "set")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_path", "data/chunk-{chunk_index:0999999999d}/file-{file_index:03d}.parquet"),
        ("data_path", "data/{chunk_index.__class__}/{file_index}.parquet"),
        ("data_path", "data/{chunk_index!r}/{file_index}.parquet"),
        ("data_path", "data/{chunk_index:{file_index}}.parquet"),
        ("data_path", "data/{chunk_index:>99999999}"),
        ("data_path", "data/{episode_chunk:03d}/{episode_index:06d}.parquet"),  # of another format version
        ("data_path", "data/{chunk_index"),
        ("data_path", "data/{}"),
        ("video_path", "{video_key:099999}"),
    ],
)
def test_path_templates_with_unknown_or_wide_fields_are_errors(dataset, field, value):
    change_info(dataset, **{field: value})
    with pytest.raises(DatasetError, match=rf"info\.json: {field} is .*The file is damaged"):
        open_metadata(dataset)


@pytest.mark.parametrize(
    "path", ["../set/data/file.parquet", "/etc/passwd", "data/../../x", "a\0b", "C:\\x", "..\\x", "x" * 300]
)
def test_file_names_outside_the_folder_are_errors(dataset, path):
    change_info(dataset, data_path=path)
    with pytest.raises(DatasetError, match=r"its metadata name the file .*, which can't be inside the folder"):
        open_metadata(dataset)


@pytest.mark.parametrize(
    "changes", [{"chunks_size": 0}, {"fps": 1e300}, {"fps": float("nan")}, {"fps": -1}, {"chunks_size": -5}]
)
def test_impossible_numbers_in_info_are_errors(dataset, changes):
    change_info(dataset, **changes)
    with pytest.raises(DatasetError, match=rf"info\.json: {next(iter(changes))} is "):
        open_metadata(dataset)


@pytest.mark.parametrize("name", ["data/chunk-000", "data/chunk-000/file-000.parquet", "meta", "meta/tasks.parquet"])
def test_links_out_of_the_folder_are_errors_unless_allowed(dataset, tmp_path, name, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (dataset / name).rename(elsewhere)
    (dataset / name).symlink_to(elsewhere)
    with pytest.raises(DatasetError, match=r"leads through a link to .*elsewhere.*, outside .*--allow-outside"):
        LeRobotDataset(dataset, action_horizon=1)
    monkeypatch.setenv(ALLOW_OUTSIDE, "")
    args = ["data", "inspect", "--allow-outside", str(tmp_path), "x"]
    assert _extract_allowed_folders(args) == ["data", "inspect", "x"]
    assert len(LeRobotDataset(dataset, action_horizon=1)) == 12


def test_links_within_the_folder_and_to_cache_blobs_are_followed(dataset, tmp_path):
    (dataset / "data").rename(dataset / "other")
    (dataset / "data").symlink_to("other")
    assert len(LeRobotDataset(dataset, action_horizon=1)) == 12
    (dataset / "data").unlink()
    (dataset / "other").rename(dataset / "data")
    cache = tmp_path / "datasets--org--name"
    snapshot = shutil.copytree(dataset, cache / "snapshots/0123")
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(cache / "blobs" / str(number))
    (tmp_path / "mine").symlink_to(snapshot)
    assert len(LeRobotDataset(tmp_path / "mine", action_horizon=1)) == 12


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [{"bytes": None, "path": None}] * 12,
            "has no image of observation.images.front in row 0, and names no image file",
        ),
        ([0.5] * 12, "observation.images.front is double; expected images"),
        (None, "has no images of observation.images.front; its columns are"),
    ],
)
def test_columns_without_images_are_errors(dataset, images, message):
    (file,) = dataset.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.drop_columns([FRONT]))
    if images is not None:
        change_rows(file, lambda table: table.append_column(FRONT, [images]))
    with pytest.raises((ValueError, KeyError), match=message):
        LeRobotDataset(dataset, action_horizon=1)[0]


@pytest.mark.parametrize("rows", [{"task_index": [0]}, {"task_index": [0, None], "task": ["a", "b"]}])
def test_tasks_without_text_or_index_are_an_error(dataset, rows):
    pq.write_table(pa.table(rows), dataset / "meta/tasks.parquet")
    with pytest.raises(
        DatasetError, match=r"tasks.parquet has the columns task_index.*; expected task, texts, and task_index, whole"
    ):
        LeRobotDataset(dataset, action_horizon=1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[1, 2]", r"has the line \[1, 2\]; expected a JSON object"),
        ('{"task": "a"}\n{"task_index": 0, "task": "b"}', "expected task, texts, and task_index, whole"),
    ],
)
def test_invalid_tasks_of_the_older_format_are_an_error(golden_root, lines, message, tmp_path):
    root = shutil.copytree(golden_root / "datasets/lerobot_v21", tmp_path / "set")
    (root / "meta/tasks.jsonl").write_text(lines)
    with pytest.raises(DatasetError, match=message):
        open_metadata(root)


@pytest.mark.parametrize("length", [10**15, 10**9, -1, 10**30])
def test_impossible_episode_lengths_are_errors(dataset, length):
    file = next((dataset / "meta/episodes").glob("*/*.parquet"))
    table = pq.read_table(file)
    values = [float(length) if length > 2**62 else length, *table["length"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("length"), "length", [values]), file)
    change_info(dataset, total_frames=None)
    with pytest.raises(DatasetError, match=r"expected a whole number up to|episode 0 has 5 frames, numbered 0 to 4"):
        LeRobotDataset(dataset, action_horizon=1)


@pytest.mark.parametrize("kind", ["numbers", "lists", "texts"])
def test_compressed_table_larger_than_memory_is_an_error(tmp_path, kind, monkeypatch):
    class Memory:
        available = 4_000_000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    rows = 500_000
    column = {
        "numbers": lambda: pa.array(np.zeros(rows)),
        "lists": lambda: pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * rows)), 2).cast(
            pa.list_(pa.float64())
        ),
        "texts": lambda: pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["x" * 100]),
    }[kind]()
    file = tmp_path / "file.parquet"
    pq.write_table(pa.table({"observation.a": column}), file, compression="zstd", use_dictionary=True)
    assert file.stat().st_size < 10_000
    with (
        pytest.raises(DatasetError, match=r"file\.parquet has 500000 rows, which take more than 2000000 bytes"),
        open_parquet(file) as opened,
    ):
        read_table(opened, file, ["observation.a"])
    pq.write_table(pa.table({"observation.a": column[:1000], "observation.b": column[:1000]}), file)
    with open_parquet(file) as opened:
        table = read_table(opened, file, ["observation.a"])
    assert table.column_names == ["observation.a"]
    assert table["observation.a"].to_pylist() == column[:1000].to_pylist()


def test_empty_table_keeps_its_columns(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.float64())}), tmp_path / "file.parquet")
    with open_parquet(tmp_path / "file.parquet") as opened:
        assert read_table(opened, tmp_path / "file.parquet").column_names == ["a"]


def test_video_frames_with_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    encode_video(tmp_path / "a.mp4", [np.zeros((64, 96, 3), np.uint8)] * 2, fps=10, encoder="libx264")
    assert VideoReader(tmp_path / "a.mp4").read(0.0, 0.01, 0.1).shape == (64, 96, 3)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 64)
    with pytest.raises(DatasetError, match=r"a\.mp4 has no frame at 0\.0000 s: .*max_pixels"):
        VideoReader(tmp_path / "a.mp4").read(0.0, 0.01, 0.1)


def test_a_name_of_a_column_that_is_no_text_is_an_error_that_names_the_file(dataset):
    file = next(dataset.glob("data/*/*.parquet"))
    data = file.read_bytes()
    assert b"timestamp" in data
    file.write_bytes(data.replace(b"timestamp", b"\xff\xfemestamp"))
    with pytest.raises(DatasetError, match=rf"{file.name} is truncated or damaged"):
        LeRobotDataset(dataset, action_horizon=1)
