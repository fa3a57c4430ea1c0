"""Written datasets are read back, whenever the writer was stopped, and their files are like LeRobot's."""

import errno
import json
import os
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from torchpi.data import LeRobotDataset, LeRobotWriter, recording, writer
from torchpi.data.metadata_writer import image_histogram, image_stats, number_stats
from torchpi.data.video import _real_time_threads, default_encoder, encode_video

BASE, WRIST = "observation.images.base", "observation.images.wrist"
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync, which matters only in a power failure."""
    monkeypatch.setattr(recording.os, "fsync", lambda descriptor: None)


def new_writer(path, **arguments):
    defaults = {
        "fps": 30,
        "cameras": {"base": (16, 24, 3), "wrist": (16, 16, 3)},
        "state_names": ["x", "y", "z"],
        "action_names": ["dx", "dy"],
        "robot_type": "my_arm",
    }
    return LeRobotWriter(path, **{**defaults, **arguments})


def some_episode(length, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, 24).astype(np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (16, 24, 3)) + np.arange(length, dtype=np.uint8)[:, None, None, None]
    return {
        BASE: smooth + np.uint8(seed),
        WRIST: rng.integers(0, 256, (length, 16, 16, 3), np.uint8),
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }


EPISODES = [some_episode(length, seed) for seed, length in enumerate((3, 1, 5, 2))]
TASKS = ["open the drawer", "close it", "open the drawer", "lift"]


def record(path, num_episodes=4, *, then=lambda writer: None, **arguments):
    """Record the first `num_episodes` of EPISODES."""
    with new_writer(path, **arguments) as writer:
        for episode, task in zip(EPISODES[:num_episodes], TASKS, strict=False):
            writer.add_episode(episode, task)
        then(writer)


def frame_of(episode, t=0):
    return {key: values[t] for key, values in episode.items()}


def require_episodes(path, num_episodes, *, exact_images=True):
    """Require that a dataset contains exactly the first `num_episodes` of EPISODES."""
    dataset = LeRobotDataset(path, action_horizon=2)
    assert dataset.episode_lengths == tuple(len(episode["action"]) for episode in EPISODES[:num_episodes])
    frames = [(e, t) for e in range(num_episodes) for t in range(dataset.episode_lengths[e])]
    for i, (e, t) in enumerate(frames):
        item, episode = dataset[i], EPISODES[e]
        assert np.array_equal(item["observation.state"], episode["observation.state"][t])
        assert np.array_equal(item["action"][0], episode["action"][t])
        assert (item["episode_index"], item["frame_index"], item["index"], item["task"]) == (e, t, i, TASKS[e])
        assert item["timestamp"] == np.float32(t / 30)
        assert item[BASE].shape == (16, 24, 3)
        if exact_images:
            assert np.array_equal(item[BASE], episode[BASE][t])
            assert np.array_equal(item[WRIST], episode[WRIST][t])
        else:  # video encodes noise badly
            assert np.abs(item[BASE].astype(int) - episode[BASE][t]).mean() < 6


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


METADATA = ["meta/episodes/chunk-000/file-000.parquet", "meta/info.json", "meta/stats.json", "meta/tasks.parquet"]


@pytest.mark.parametrize("video", [False, True])
def test_written_episodes_are_read_back(video, tmp_path):
    with new_writer(tmp_path / "set", video=video) as writer:
        for episode, task in zip(EPISODES, TASKS, strict=True):
            for t in range(len(episode["action"])):
                writer.add_frame({key: values[t] for key, values in episode.items()})
            writer.save_episode(task)
    require_episodes(tmp_path / "set", 4, exact_images=not video)
    videos = [f"videos/{key}/chunk-000/file-000.mp4" for key in (BASE, WRIST)] if video else []
    assert files_of(tmp_path / "set") == ["data/chunk-000/file-000.parquet", *METADATA, *videos]


@pytest.mark.parametrize("video", [False, True])
def test_large_datasets_are_split_into_files(video, tmp_path, monkeypatch):
    monkeypatch.setattr(recording.metadata_writer.lerobot, "CHUNKS_SIZE", 2)  # files in a folder
    record(tmp_path, video=video, data_file_mb=0.006, video_file_mb=0.003)
    require_episodes(tmp_path, 4, exact_images=not video)
    files = files_of(tmp_path)
    assert "data/chunk-001/file-000.parquet" in files
    assert (f"videos/{BASE}/chunk-001/file-000.mp4" in files) == video


def test_info_describes_the_dataset(tmp_path):
    record(tmp_path, video=True)
    dataset = LeRobotDataset(tmp_path, action_horizon=1)
    assert (dataset.fps, dataset.robot_type) == (30, "my_arm")
    assert (dataset.state_names, dataset.action_names) == (("x", "y", "z"), ("dx", "dy"))
    assert dataset.tasks == {0: "open the drawer", 1: "close it", 2: "lift"}
    assert dataset.features[BASE]["shape"] == [16, 24, 3]
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 11, 3)
    assert info["splits"] == {"train": "0:4"}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_are_like_lerobots(kind, tmp_path, golden_root):
    """The columns, types and metadata are those that LeRobot wrote for the same features."""
    golden = golden_root / "datasets" / f"lerobot_v3_{kind}"
    source = LeRobotDataset(golden, action_horizon=1)
    arguments = {
        "fps": 80,
        "cameras": {"base": (48, 48, 3), "wrist": (48, 48, 3)},
        "state_names": source.state_names,
        "action_names": source.action_names,
        "robot_type": "sawyer",
        "video": kind == "video",
    }
    with new_writer(tmp_path, **arguments) as writer:
        for i in range(len(source)):
            item = source[i]
            writer.add_frame(
                {**{key: item[key] for key in (BASE, WRIST, "observation.state")}, "action": item["action"][0]}
            )
            if i + 1 in (12, 21, 36):
                writer.save_episode(item["task"])
    for file in ("data/chunk-000/file-000.parquet", *(name for name in METADATA if name.endswith("parquet"))):
        ours, theirs = pq.read_schema(tmp_path / file), pq.read_schema(golden / file)
        assert ours.equals(theirs), file
        for key, value in (theirs.metadata or {}).items():
            value, found = json.loads(value), json.loads(ours.metadata[key])
            value.pop("fingerprint", None)  # of the writer's own cache
            assert found.pop("creator", None) is None or value.pop("creator")  # has the version of pyarrow
            assert found == value, file
    columns = [pq.read_table(root / METADATA[0]).to_pylist() for root in (tmp_path, golden)]
    for ours, theirs in zip(*columns, strict=True):
        for key, value in theirs.items():
            if not key.startswith("stats"):
                assert ours[key] == value, key
    infos = [json.loads((root / "meta/info.json").read_text()) for root in (tmp_path, golden)]
    for info in infos:
        for key in (BASE, WRIST):
            details = info["features"][key].pop("info", {})
            for name in [
                name for name in details if name.split(".")[-1] in ("fast_decode", "video_backend", "extra_options")
            ]:
                del details[name]
            info[key] = details
    assert infos[0] == infos[1]


def test_statistics_are_exact(tmp_path):
    record(tmp_path)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    rows = pq.read_table(tmp_path / METADATA[0]).to_pylist()
    everything = {key: np.concatenate([episode[key] for episode in EPISODES]) for key in EPISODES[0]}
    for name, found, values in (
        ("all", stats["action"], everything["action"]),
        (
            "episode 2",
            {key.split("/")[-1]: value for key, value in rows[2].items() if "/action/" in key},
            EPISODES[2]["action"],
        ),
    ):
        values = values.astype(np.float64)
        for key, expected in (
            ("min", values.min(axis=0)),
            ("max", values.max(axis=0)),
            ("mean", values.mean(axis=0)),
            ("std", values.std(axis=0)),
            ("q01", np.quantile(values, 0.01, axis=0)),
            ("q99", np.quantile(values, 0.99, axis=0)),
            ("count", [len(values)]),
        ):
            np.testing.assert_allclose(found[key], expected, rtol=1e-12, err_msg=f"{name} {key}")
    pixels = everything[WRIST].reshape(-1, 3) / 255
    for key, expected in (("mean", pixels.mean(axis=0)), ("std", pixels.std(axis=0)), ("max", pixels.max(axis=0))):
        np.testing.assert_allclose(np.ravel(stats[WRIST][key]), expected, rtol=1e-12)
    np.testing.assert_allclose(
        np.ravel(stats[WRIST]["q10"]), np.quantile(pixels, 0.1, axis=0, method="inverted_cdf"), rtol=1e-12
    )
    assert np.shape(stats[WRIST]["q01"]) == (3, 1, 1)


def test_large_images_are_subsampled_for_statistics():
    image = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    assert image_histogram(image).sum() == 3 * 128 * 150
    stats = image_stats(2 * image_histogram(image), 2)
    np.testing.assert_allclose(np.ravel(stats["mean"]), 0.5, atol=0.01)
    assert number_stats(np.zeros((3, 1)))["q50"] == [0.0]


def test_single_dimension_is_stored_as_plain_numbers(tmp_path):
    """As in LeRobot."""
    with new_writer(tmp_path, state_names=["x"], action_names=["dx"]) as writer:
        frames = {**EPISODES[0], "observation.state": np.ones((3, 1)), "action": np.arange(3.0).reshape(3, 1)}
        writer.add_episode(frames, "t")
    assert str(pq.read_schema(tmp_path / "data/chunk-000/file-000.parquet").field("action").type) == "float"
    item = LeRobotDataset(tmp_path, action_horizon=2)[1]
    assert item["observation.state"].tolist() == [1]
    assert item["action"].tolist() == [[1], [2]]


def test_frames_are_copied(tmp_path):
    for video in (False, True):
        with new_writer(tmp_path / str(video), video=video) as writer:
            frame = {key: values[0].copy() for key, values in EPISODES[0].items()}
            for t in range(3):
                for key, value in frame.items():
                    value[...] = EPISODES[0][key][t]
                writer.add_frame(frame)
            writer.save_episode(TASKS[0])
        require_episodes(tmp_path / str(video), 1, exact_images=not video)


def test_discarded_episode_is_not_written(tmp_path):
    with new_writer(tmp_path) as writer:
        writer.add_frame(frame_of(EPISODES[1]))
        assert writer.num_frames_in_progress == 1
        writer.discard_episode()
        assert writer.num_frames_in_progress == 0
        writer.add_episode(EPISODES[0], TASKS[0])
        assert writer.num_episodes == 1
    require_episodes(tmp_path, 1)


def test_unsaved_frames_are_dropped_with_a_warning(tmp_path):
    writer = new_writer(tmp_path)
    writer.add_episode(EPISODES[0], TASKS[0])
    writer.add_frame(frame_of(EPISODES[1]))
    with pytest.warns(UserWarning, match="last 1 frame was not saved as an episode, and dropped"):
        writer.finalize()
    writer.finalize()  # does nothing
    require_episodes(tmp_path, 1)
    with pytest.raises(ValueError, match="is finished"):
        writer.add_frame({})


def test_without_episodes_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="No episode was saved"), new_writer(tmp_path / "set"):
        pass
    assert not (tmp_path / "set").exists()


# Interruptions


@pytest.mark.parametrize("num_episodes", [0, 2])
def test_interrupt_keeps_the_saved_episodes(num_episodes, tmp_path):
    def then(writer):
        writer.add_frame(frame_of(EPISODES[2]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "set", num_episodes, then=then)
    if num_episodes:
        require_episodes(tmp_path / "set", num_episodes)
        assert files_of(tmp_path / "set") == ["data/chunk-000/file-000.parquet", *METADATA]
    else:
        assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NO_SPACE])
@pytest.mark.parametrize("part", ["encode_video", "write_parquet"])
def test_error_while_writing_an_episode_keeps_the_others(error, part, tmp_path, monkeypatch):
    writing = getattr(writer, part)

    def fails_later(path, *arguments, **options):
        if "000002" in path.name:
            path.write_bytes(b"half of it")
            raise error
        return writing(path, *arguments, **options)

    monkeypatch.setattr(writer, part, fails_later)
    with pytest.raises(type(error)):
        record(tmp_path, video=True)
    require_episodes(tmp_path, 2, exact_images=False)
    assert not [name for name in files_of(tmp_path) if name.startswith(".")]


def test_episode_can_be_saved_again_after_a_full_disk(tmp_path, monkeypatch):
    """The frames are kept."""
    with new_writer(tmp_path) as recorder:
        recorder.add_episode(EPISODES[0], TASKS[0])
        recorder.add_frame(frame_of(EPISODES[1]))
        with monkeypatch.context() as patch:
            patch.setattr(recording, "fsync", _raise(NO_SPACE))
            with pytest.raises(OSError, match="No space left"):
                recorder.save_episode(TASKS[1])
        recorder.save_episode(TASKS[1])
    require_episodes(tmp_path, 2)


@pytest.mark.parametrize("video", [False, True])
def test_full_disk_keeps_one_file_per_episode(video, tmp_path, monkeypatch):
    """Moving files takes no space, unlike merging them."""
    monkeypatch.setattr(recording, "concatenate_videos" if video else "write_parquet", _raise(NO_SPACE))
    record(tmp_path, video=video)
    require_episodes(tmp_path, 4, exact_images=not video)
    assert "data/chunk-000/file-003.parquet" in files_of(tmp_path)


def test_finalize_can_be_called_again_after_a_full_disk(tmp_path, monkeypatch):
    writer = new_writer(tmp_path)
    writer.add_episode(EPISODES[0], TASKS[0])
    with monkeypatch.context() as patch:
        patch.setattr(recording.metadata_writer, "tasks_table", _raise(NO_SPACE))
        with pytest.raises(OSError, match="No space left") as error:
            writer.finalize()
    assert "saved episodes are safe in" in error.value.__notes__[0]
    writer.finalize()
    require_episodes(tmp_path, 1)


def test_first_error_is_raised_with_the_second_as_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.metadata_writer, "tasks_table", _raise(NO_SPACE))
    with pytest.raises(KeyboardInterrupt) as error:
        record(tmp_path, 1, then=_raise(KeyboardInterrupt()))
    assert any("No space left" in note for note in error.value.__notes__)
    monkeypatch.undo()
    assert LeRobotWriter.recover(tmp_path) == 1
    require_episodes(tmp_path, 1)


@pytest.mark.parametrize(
    ("video", "full"), [(True, True), *(pytest.param(video, False, marks=pytest.mark.slow) for video in (False, True))]
)
def test_recover_after_a_kill_at_any_time(video, full, tmp_path, monkeypatch):
    """Before every rename, a reader sees a complete dataset or an error, and `recover` loses nothing."""
    snapshots, num_saved = [], []
    rename = os.replace

    def replace(source, target):
        snapshots.append((tmp_path / str(len(snapshots)), len(num_saved)))
        shutil.copytree(tmp_path / "set", snapshots[-1][0])
        rename(source, target)

    monkeypatch.setattr(recording.os, "replace", replace)
    if full:
        monkeypatch.setattr(recording, "write_parquet", _raise(NO_SPACE))
    with new_writer(tmp_path / "set", video=video, data_file_mb=0.012, video_file_mb=0.005) as writer:
        for episode, task in zip(EPISODES[:3], TASKS, strict=False):
            writer.add_episode(episode, task)
            num_saved.append(1)
    monkeypatch.undo()
    num_recovered = 0
    for path, num_episodes in snapshots[1:]:  # before the first rename, recording.json does not exist
        if not (path / "meta/info.json").exists():
            with pytest.raises(ValueError, match=r"was killed.*LeRobotWriter\.recover"):
                LeRobotDataset(path, action_horizon=1)
        if (path / ".recording/episode_000000.json").exists():
            found = LeRobotWriter.recover(path)
            assert found >= num_episodes
            require_episodes(path, found, exact_images=not video)
            assert not [name for name in files_of(path) if "recording" in name or name.endswith(".part")]
            num_recovered += 1
        else:
            assert not num_episodes
    assert num_recovered > 10


def test_running_recording_can_neither_be_read_nor_recovered(tmp_path):
    with new_writer(tmp_path) as writer:
        writer.add_episode(EPISODES[0], TASKS[0])
        with pytest.raises(ValueError, match="still in progress"):
            LeRobotDataset(tmp_path, action_horizon=1)
        with pytest.raises(ValueError, match="still being recorded by another process"):
            LeRobotWriter.recover(tmp_path)
        with pytest.raises(ValueError, match=r"not an empty folder; it holds an unfinished recording.*recover"):
            new_writer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no unfinished recording"):
        LeRobotWriter.recover(tmp_path)


def test_recording_of_an_earlier_version_is_recovered(tmp_path, monkeypatch):
    """Earlier versions wrote other settings to recording.json, and more fields per episode."""
    monkeypatch.setattr(recording.metadata_writer, "tasks_table", _raise(NO_SPACE))
    with pytest.raises(OSError, match="No space left"):
        record(tmp_path, 2)
    monkeypatch.undo()
    file = tmp_path / ".recording/recording.json"
    info = json.loads(file.read_text())
    kept = {name: info[name] for name in ("fps", "features", "robot_type")}
    file.write_text(json.dumps({**kept, "data_file_mb": 100, "video_file_mb": 200}))
    for episode in file.parent.glob("episode_*.json"):
        episode.write_text(json.dumps({**json.loads(episode.read_text()), "stats": {}}))
    assert LeRobotWriter.recover(tmp_path) == 2
    require_episodes(tmp_path, 2)


@pytest.mark.parametrize("text", ["{", "{}", '{"fps": 30}', "[]"])
def test_damaged_recording_is_an_error(text, tmp_path, monkeypatch):
    (tmp_path / ".recording").mkdir()
    (tmp_path / ".recording/recording.json").write_text(text)
    with pytest.raises(ValueError, match=r"recording\.json"):
        LeRobotWriter.recover(tmp_path)


def _raise(error):
    def function(*_, **__):
        raise error

    return function


# Errors


def test_non_empty_folder_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists already and is not an empty folder; choose another path"):
        new_writer(tmp_path)
    with pytest.raises(ValueError, match="not an empty folder"):
        new_writer(tmp_path / "notes.txt")
    assert files_of(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"cameras": {"base": (16, 16)}}, r"Camera 'base' has the shape \[16, 16\]"),
        ({"cameras": {"base": (16, 16, 4)}}, r"expected \(height, width, 3\)"),
        ({"cameras": {"a/b": (16, 16, 3)}}, "a name without '/'"),
        ({"cameras": {"base": (15, 16, 3)}, "video": True}, "15 x 16; video needs an even"),
        ({"state_names": []}, "state_names is"),
        ({"action_names": ["x", "x"]}, "a different name for each"),
        ({"action_names": "xyz"}, "action_names is 'xyz'"),
    ],
)
def test_invalid_settings_are_errors(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        new_writer(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (BASE, None, KeyError, f"has no {BASE}; expected {BASE}, {WRIST}"),
        ("observation.images.top", 0, KeyError, r"has the unknown keys observation\.images\.top"),
        (
            BASE,
            np.zeros((24, 16, 3), np.uint8),
            ValueError,
            rf"{BASE} is uint8 \[24, 16, 3\]; expected uint8 \[16, 24, 3\]",
        ),
        (BASE, np.zeros((16, 24, 3), np.float32), ValueError, rf"{BASE} is float32"),
        ("action", np.zeros(3), ValueError, r"action is float64 \[3\]; expected numbers \[2\]: dx, dy"),
        ("action", np.array(["a", "b"]), ValueError, "action is <U1"),
        ("action", np.array([0, np.nan]), ValueError, r"NaN or infinity in action, dimension 1 \(dy\)"),
        ("observation.state", [0, 0, 1e39], ValueError, r"NaN or infinity in observation\.state, dimension 2 \(z\)"),
    ],
)
def test_invalid_frames_are_errors(key, value, error, message, tmp_path):
    frame = {name: values[0] for name, values in EPISODES[0].items()}
    with new_writer(tmp_path) as writer:
        writer.add_episode(EPISODES[0], TASKS[0])
        bad = {**frame, key: value} if value is not None else {k: v for k, v in frame.items() if k != key}
        with pytest.raises(error, match=message):
            writer.add_frame(bad)
        assert writer.num_frames_in_progress == 0  # a refused frame is not added
    require_episodes(tmp_path, 1)


def test_invalid_episodes_are_errors(tmp_path):
    with new_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="no frames"):
            writer.save_episode("t")
        with pytest.raises(ValueError, match=r"different lengths.*'action': 1"):
            writer.add_episode({**EPISODES[0], "action": EPISODES[0]["action"][:1]}, "t")
        with pytest.raises(ValueError, match="no frames"):
            writer.add_episode({key: values[:0] for key, values in EPISODES[0].items()}, "t")
        with pytest.raises(ValueError, match="task of an episode is ' '"):
            writer.add_episode(EPISODES[0], " ")
        writer.add_episode(EPISODES[0], TASKS[0])
        writer.add_frame(frame_of(EPISODES[0]))
        with pytest.raises(ValueError, match=r"\(1 frame\) is in progress"):
            writer.add_episode(EPISODES[0], "t")
        writer.discard_episode()
    require_episodes(tmp_path, 1)


def test_missing_library_is_an_error_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchpi\[data\]'"):
        new_writer(tmp_path / "set", video=True)
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root gets real-time threads")
def test_encoding_leaves_no_real_time_threads(tmp_path):
    found = []

    def frames():
        for number in range(4):
            if number > 1:
                found.append(_real_time_threads())
            yield np.zeros((96, 96, 3), np.uint8)

    encode_video(tmp_path / "video.mp4", frames(), fps=10, encoder=default_encoder())
    assert found == [set(), set()]
    assert _real_time_threads() == set()
