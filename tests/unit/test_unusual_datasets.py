"""Datasets that other programs, systems and interruptions make of LeRobot's: read where that is possible, and errors
that name the real cause where it is not."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchpi.cli import main
from torchpi.data import LeRobotDataset, LeRobotWriter, select_episodes
from torchpi.robots import Embodiment

CAMERA = "observation.images.front"
LENGTHS = (4, 3, 5)
ROBOT = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=["a", "b"], actions=["a", "b"])
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
INDICES = ("frame_index", "episode_index", "index", "task_index")


def picture(number):
    """An image of one colour that encodes the frame's number."""
    return np.full((8, 8, 3), number, np.uint8)


def write(path, *, video=False):
    with LeRobotWriter(
        path, fps=10, cameras={"front": (8, 8, 3)}, state_names=["a", "b"], action_names=["a", "b"], video=video
    ) as writer:
        frame = 0
        for length in LENGTHS:
            for _ in range(length):
                writer.add_frame({CAMERA: picture(frame), "observation.state": [frame, 0], "action": [frame, 1]})
                frame += 1
            writer.save_episode("push it")
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return {video: write(root / str(video), video=video) for video in (False, True)}


@pytest.fixture
def v3(originals, tmp_path):
    return shutil.copytree(originals[False], tmp_path / "set")


@pytest.fixture
def v3_video(originals, tmp_path):
    return shutil.copytree(originals[True], tmp_path / "set")


@pytest.fixture
def v21(v3):
    """The same dataset in v2.1, with one file per episode."""
    table, info = pq.read_table(v3 / DATA), json.loads((v3 / "meta/info.json").read_text())
    for episode in range(len(LENGTHS)):
        mask = np.equal(table.column("episode_index").to_numpy(), episode)
        pq.write_table(table.filter(mask), v3 / f"data/chunk-000/episode_{episode:06}.parquet")
    shutil.rmtree(v3 / "meta/episodes")
    rows = [{"episode_index": i, "tasks": ["push it"], "length": length} for i, length in enumerate(LENGTHS)]
    write_lines(v3, rows)
    (v3 / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push it"}\n')
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    (v3 / "meta/info.json").write_text(json.dumps(info))
    return v3


def write_lines(root, rows):
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(path, **columns):
    """Rewrite columns of a parquet file; a function gets the column's values."""
    table = pq.read_table(path)
    found = {name: table.column(name) for name in table.column_names}
    changed = {name: new(found[name].to_pylist()) if callable(new) else new for name, new in columns.items()}
    pq.write_table(pa.table({**found, **changed}), path)


def change_info(root, **values):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_reads(root, *, episodes=(0, 1, 2), task="push it", **options):
    """Require the right numbers and, if cameras are read, the right image for every frame of the episodes."""
    dataset = LeRobotDataset(root, action_horizon=1, episodes=episodes, **options)
    starts = np.cumsum([0, *LENGTHS])
    expected = [frame for episode in episodes for frame in range(starts[episode], starts[episode + 1])]
    items = [dataset[i] for i in range(len(dataset))]
    assert [int(item["observation.state"][0]) for item in items] == expected
    assert {item["task"] for item in items} == {task}
    if dataset.camera_keys and dataset.features[CAMERA]["dtype"] != "video":
        assert [int(item[CAMERA].max()) for item in items] == expected
    return dataset


# Columns


@pytest.mark.parametrize(
    "form",
    [
        lambda values: pa.array([[value] for value in values]),
        lambda values: pa.array([[[value]] for value in values]),
        lambda values: pa.array([float(value) for value in values]),
        lambda values: pa.array(values, pa.uint8()),
    ],
    ids=["lists of one", "lists of lists of one", "floats", "bytes"],
)
def test_indices_of_any_numeric_type_are_read(form, v3):
    change(v3 / DATA, **dict.fromkeys(INDICES, form))
    dataset = assert_reads(v3)
    assert all(dataset.columns[name].dtype == np.int64 and dataset.columns[name].ndim == 1 for name in INDICES)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("task_index", pa.array([[0, 1]] * 12), r"task_index has \[0 1\] in its first frame; expected one number"),
        ("task_index", pa.array([0.5] * 12), r"column task_index has 0\.5 in its first frame"),
        ("timestamp", pa.array(range(12), pa.timestamp("ms")), r"column timestamp; timestamp is timestamp\[ms\]"),
        ("episode_index", pa.array(["0"] * 12), "no column episode_index; episode_index is string, not numbers"),
        ("action", pa.array([None] * 12, pa.list_(pa.float32())), "column action: 12 values are missing"),
    ],
)  # fmt: skip
def test_column_of_a_wrong_type_is_named(name, values, message, v3):
    change(v3 / DATA, **{name: values})
    with pytest.raises((ValueError, KeyError), match=message):
        LeRobotDataset(v3, action_horizon=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([[0.0] * (i % 3) for i in range(12)]), "Its lists have the lengths 0, 1, 2; expected one length"),
        (pa.array([None] * 12, pa.float32()), "12 values are missing"),
    ],
)
def test_unreadable_extra_column_is_skipped(values, message, v3):
    change(v3 / DATA, extra=values)
    with pytest.warns(UserWarning, match=rf"the columns extra are skipped.*{message}\)\. Name the columns that"):
        assert "extra" not in assert_reads(v3).columns
    assert_reads(v3, columns=())
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(v3, action_horizon=1, columns=["extra"])


@pytest.mark.parametrize("values", [pa.array([1.0] * 3), pa.array([[1.0, 2.0]] * 3)])
def test_extra_column_missing_in_some_files_is_skipped(values, v21):
    change(v21 / "data/chunk-000/episode_000001.parquet", extra=values)
    change(v21 / "data/chunk-000/episode_000002.parquet", extra=pa.array([[1.0]] * 5))
    with pytest.warns(UserWarning, match=r"the columns extra are skipped.*episode_000001\.parquet: extra has"):
        assert_reads(v21)


def test_column_missing_only_in_other_episodes_is_read(v3):
    change(v3 / DATA, action=lambda values: pa.array([*values[:7], *[None] * 5], pa.list_(pa.float32())))
    assert_reads(v3, episodes=(0, 1))
    with pytest.raises(ValueError, match="column action: 5 values are missing"):
        LeRobotDataset(v3, action_horizon=1)


# Files written by other systems


@pytest.mark.parametrize(
    "name",
    [
        "meta/episodes/chunk-000/._file-000.parquet", "meta/episodes/.ipynb_checkpoints/file-000-checkpoint.parquet",
        "meta/episodes/chunk-000/~$file-000.parquet", "meta/episodes/chunk-000/file-000.parquet.lock",
        "meta/episodes/chunk-000/Thumbs.db", "data/chunk-000/._file-000.parquet", ".DS_Store",
    ],
)  # fmt: skip
def test_hidden_files_are_ignored(name, v3):
    (v3 / name).parent.mkdir(exist_ok=True)
    (v3 / name).write_bytes(b"\0\5\26\7")
    assert_reads(v3)


def test_byte_order_marks_and_windows_line_ends_are_read(v21):
    for name in ("info.json", "tasks.jsonl", "episodes.jsonl"):
        path = v21 / "meta" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert_reads(v21)


def test_duplicate_list_of_episodes_is_an_error(v3):
    shutil.copy(v3 / EPISODES, v3 / EPISODES.replace("file-000", "file-000 (1)"))
    with pytest.raises(ValueError, match=r"has the episodes 0, 1, 2 more than once: .*one of its files is a copy"):
        LeRobotDataset(v3, action_horizon=1)


# Episodes


@pytest.mark.parametrize("lost", [("chunk_index", "file_index", "from_timestamp"), ("from_timestamp",)])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_missing_video_is_an_error_only_if_its_episode_and_camera_are_selected(lost, value, v3_video):
    columns = [f"videos/{CAMERA}/{name}" for name in lost]
    change(v3_video / EPISODES, **dict.fromkeys(columns, lambda values: pa.array([*values[:2], value], pa.float64())))
    assert_reads(v3_video, episodes=(0, 1))
    assert_reads(v3_video, cameras=())
    with pytest.raises(
        ValueError, match=rf"Episode 2 of .* has no video of {CAMERA}: .*leave the episode out \(--select"
    ):
        LeRobotDataset(v3_video, action_horizon=1)


@pytest.mark.filterwarnings("always:.*have no frames:UserWarning")
def test_empty_episodes_are_left_out(v21, tmp_path, capsys):
    lengths = [4, 0, 5]
    write_lines(v21, [{"episode_index": i, "tasks": ["push it"], "length": length} for i, length in enumerate(lengths)])
    change_info(v21, total_frames=9)
    path = v21 / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.warns(UserWarning, match="the episodes 1 have no frames, and are left out"):
        dataset = LeRobotDataset(v21, action_horizon=1)
    assert dataset.episode_indices == (0, 2)
    main(["data", "merge", str(v21), "--out", str(tmp_path / "merged")])
    assert "the episodes 1 have no frames" in capsys.readouterr().err
    assert LeRobotDataset(tmp_path / "merged", action_horizon=1).episode_lengths == (4, 5)
    with pytest.raises(ValueError, match="the episodes 1 have no frames; choose others"):
        LeRobotDataset(v21, action_horizon=1, episodes=[1])


def test_empty_list_of_episodes_is_an_error(v21):
    write_lines(v21, [])
    for read in (lambda: LeRobotDataset(v21, action_horizon=1), lambda: select_episodes(v21, "0:2")):
        with pytest.raises(ValueError, match=r"The list of episodes of .* is empty"):
            read()


# Instructions


@pytest.mark.parametrize("tasks", ["push it", [0], 0])
def test_tasks_of_an_episode_may_be_texts_or_indices(tasks, v21):
    write_lines(v21, [{"episode_index": i, "tasks": tasks, "length": length} for i, length in enumerate(LENGTHS)])
    assert select_episodes(v21, "task: push *") == [0, 1, 2]


def test_tasks_over_several_lines_are_read(v21):
    (v21 / "meta/tasks.jsonl").write_text('{\n  "task_index": 0,\n  "task": "push it"\n}\n')
    assert_reads(v21)


def without_tasks(root):
    (root / "meta/tasks.parquet").unlink()


def without_task_index(root):
    table = pq.read_table(root / DATA)
    pq.write_table(table.drop_columns(["task_index"]), root / DATA)


@pytest.mark.parametrize("remove", [without_tasks, without_task_index])
def test_prompt_replaces_missing_instructions(remove, v3):
    remove(v3)
    with pytest.raises((FileNotFoundError, KeyError), match="--prompt"):
        LeRobotDataset(v3, action_horizon=1)
    assert assert_reads(v3, task="wave", prompt="wave").tasks == {0: "wave"}


def test_commands_that_read_instructions_take_a_prompt(v3, tmp_path, capsys):
    without_tasks(v3)
    (tmp_path / "arm.json").write_text(json.dumps(ROBOT.to_dict()))
    main(["stats", str(v3), "--embodiment", str(tmp_path / "arm.json"), "--json"])
    assert json.loads(capsys.readouterr().out)["frames"] == 12
    options = [
        "bench",
        "data",
        str(v3),
        "--config",
        "tiny",
        "--batch",
        "2",
        "--workers",
        "0",
        "--repeats",
        "1",
        "--json",
    ]
    with pytest.raises(SystemExit):
        main(options)
    assert "give one for all frames (--prompt" in capsys.readouterr().err
    main([*options, "--prompt", "wave"])
    assert json.loads(capsys.readouterr().out)["cameras"] == [CAMERA]


# Images


def relative(frame):
    return f"images/{CAMERA}/frame-{frame:06}.png"


@pytest.mark.parametrize(
    "name",
    [
        relative,
        lambda frame: f"/home/else/set/{relative(frame)}",
        lambda frame: f"C:/set/{relative(frame)}".replace("/", "\\"),
    ],
    ids=["relative", "of another computer", "of Windows"],
)  # fmt: skip
@pytest.mark.parametrize("plain", [False, True])
def test_separate_image_files_are_read(name, plain, v3):
    (v3 / relative(0)).parent.mkdir(parents=True)
    for frame, image in enumerate(pq.read_table(v3 / DATA).column(CAMERA).to_pylist()):
        (v3 / relative(frame)).write_bytes(image["bytes"])
    names = [name(frame) for frame in range(12)]
    type_ = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array(names) if plain else pa.array([{"bytes": None, "path": path} for path in names], type_)
    change(v3 / DATA, **{CAMERA: images})
    assert_reads(v3)
    (v3 / relative(3)).unlink()
    with pytest.raises(FileNotFoundError, match=r"row 3 names the image .*frame-000003\.png, which is not in"):
        LeRobotDataset(v3, action_horizon=1)[3]


def test_images_as_plain_bytes_are_read(v3):
    change(v3 / DATA, **{CAMERA: lambda values: pa.array([image["bytes"] for image in values])})
    assert_reads(v3)


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "{root}/../secret.png"])
def test_images_outside_the_dataset_are_not_read(name, v3):
    (v3.parent / "secret.png").write_bytes(pq.read_table(v3 / DATA).column(CAMERA)[0].as_py()["bytes"])
    change(v3 / DATA, **{CAMERA: pa.array([name.format(root=v3)] * 12)})
    with pytest.raises(FileNotFoundError, match="which is not in the dataset's folder"):
        LeRobotDataset(v3, action_horizon=1)[0]


# Interrupted recordings and incomplete copies

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"
CONTENTS = {
    "a pointer to a file, not the file itself.*`git lfs pull`": POINTER,
    "a pointer to a file.*`git annex get": b"/annex/objects/SHA256E-s1--a.mp4\n",
    "a web page": b"\n<!DOCTYPE html><html>",
    "it is empty": b"",
    "it contains only zeros": bytes(100),
    "The recording ended before the file was complete": None,
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((DATA, message) for message in CONTENTS),
        *((name, message) for name in (EPISODES, VIDEO) for message in (next(iter(CONTENTS)), "The recording ended")),
    ],
)
def test_error_about_an_unreadable_file_names_the_cause(name, message, v3_video):
    path, content = v3_video / name, CONTENTS.get(message)
    path.write_bytes(path.read_bytes()[:-20] if content is None and name.endswith(".parquet") else content or b"")
    if content is None and name.endswith(".mp4"):
        path.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41\0\0\0\x08free" + bytes(100))
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(v3_video, action_horizon=1)[0]


@pytest.mark.parametrize("name", ["info.json", "tasks.jsonl", "episodes.jsonl"])
def test_error_about_a_pointer_file_names_the_cause(name, v21):
    (v21 / "meta" / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a pointer to a file"):
        LeRobotDataset(v21, action_horizon=1)


def test_error_about_a_broken_link_names_the_cause(v3):
    (v3 / DATA).unlink()
    (v3 / DATA).symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=r"is a link to \.\./\.\./blobs/abc, which does not exist"):
        LeRobotDataset(v3, action_horizon=1)


def test_error_about_a_missing_list_of_episodes_names_the_cause(v3):
    shutil.rmtree(v3 / "meta/episodes")
    with pytest.raises(FileNotFoundError, match=r"json states 3 episodes: the recording ended"):
        LeRobotDataset(v3, action_horizon=1)
    write_lines(v3, [{"episode_index": 0, "tasks": [], "length": 4}])
    with pytest.raises(FileNotFoundError, match=r"another format than v3\.0.*two versions are mixed"):
        LeRobotDataset(v3, action_horizon=1)


def test_error_about_wrong_totals_names_the_cause(v3):
    change_info(v3, total_frames=99)
    with pytest.raises(ValueError, match=r"total_frames 99, but the list of episodes has 3 with 12.*these numbers"):
        LeRobotDataset(v3, action_horizon=1)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v3.1", "newer than this torchpi: install a newer torchpi, or use a revision in an older format"),
        ("v10.0", "newer than this torchpi"),
        ("v1.6", "LeRobot's own scripts convert older datasets"),
        (None, "LeRobot's own scripts convert older datasets, and write the version"),
    ],
)
def test_error_about_an_unsupported_version_has_advice(version, message, v3):
    change_info(v3, codebase_version=version)
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(v3, action_horizon=1)


@pytest.mark.parametrize("version", ["3.0", 3.0])
def test_version_without_the_letter_v_is_read(version, v3):
    change_info(v3, codebase_version=version)
    assert_reads(v3)


# Addresses


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("lerobot/pusht", "hf://lerobot/pusht"),
        ("lerobot/pusht@v2.1", "hf://lerobot/pusht@v2.1"),
        ("https://huggingface.co/datasets/lerobot/pusht/tree/refs/pr/1", "hf://lerobot/pusht@refs/pr/1"),
    ],
)
def test_error_suggests_the_hub_address(path, address):
    with pytest.raises((FileNotFoundError, ValueError), match=f"{address}\\.$"):
        LeRobotDataset(path, action_horizon=1)
