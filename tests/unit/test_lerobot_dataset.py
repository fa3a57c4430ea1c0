"""Reading of datasets written by LeRobot, and errors about damaged ones."""

import json
import os
import pickle
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchpi import cli
from torchpi.data import LeRobotDataset, LeRobotWriter, camera_keys_of, to_observation
from torchpi.data.lerobot import VideoPool
from torchpi.data.metadata import open_metadata
from torchpi.data.rename import parse_rename
from torchpi.robots import Camera, Embodiment, get_embodiment

SETS = {"lerobot_v3_image": "v3_image", "lerobot_v3_video": "v3_video", "lerobot_v21": "v21"}
BASE = "observation.images.base"


@pytest.fixture
def golden_sets(golden_root):
    return golden_root / "datasets"


@pytest.fixture
def copy_of(golden_sets, tmp_path):
    """A function that copies a golden dataset, for tests that damage it."""

    def copy(name):
        shutil.copytree(golden_sets / name, tmp_path / name)
        return tmp_path / name

    return copy


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_columns(path, change):
    """Rewrite a Parquet file with the columns that `change` returns."""
    table = pq.read_table(path)
    columns = change({name: table.column(name) for name in table.column_names})
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("name", SETS)
def test_items_equal_lerobot(name, golden_sets):
    dataset = LeRobotDataset(golden_sets / name, action_horizon=16)
    with np.load(golden_sets / f"expected_{SETS[name]}.npz") as arrays:
        expected = {key: arrays[key] for key in arrays.files}
    assert dataset.episode_lengths == tuple(expected.pop("lengths"))
    for n, i in enumerate(expected.pop("index")):
        item = dataset[i]
        assert item["index"] == i
        for key, values in expected.items():
            assert np.array_equal(item[key], values[n]), (i, key)
            assert key == "task" or np.asarray(item[key]).dtype == values.dtype


@pytest.mark.parametrize("name", ["lerobot_v3_video", "lerobot_v21"])
def test_video_frames_equal_sequential_decoding_by_pyav(name, golden_sets):
    """Every frame, read in random order."""
    dataset = LeRobotDataset(golden_sets / name, action_horizon=1)
    frames = []
    for path in sorted((golden_sets / name / "videos").rglob(f"{'*' if name == 'lerobot_v21' else BASE}/**/*.mp4")):
        if BASE in str(path):
            with av.open(str(path)) as container:
                frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(dataset)
    for i in np.random.default_rng(0).permutation(len(dataset)):
        assert np.array_equal(dataset[i][BASE], frames[i])


def test_attributes_describe_the_dataset(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=4)
    assert len(dataset) == 36
    assert dataset.fps == 80
    assert dataset.robot_type == "sawyer"
    assert dataset.camera_keys == (BASE, "observation.images.wrist")
    assert dataset.tasks == {0: "Reach a goal position", 1: "Press a button from the top"}
    assert dataset.state_names == ("x", "y", "z", "gripper")
    assert dataset.action_names == ("dx", "dy", "dz", "gripper")
    assert dataset.features["action"]["shape"] == [4]
    assert dataset.columns["observation.state"].shape == (36, 4)
    assert dataset.columns["episode_index"].tolist() == [0] * 12 + [1] * 9 + [2] * 15


def test_actions_past_the_end_repeat_the_last_action(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=4)
    item, actions = dataset.numbers(10), dataset.columns["action"]  # episode 0 has 12 frames
    assert np.array_equal(item["action"], actions[[10, 11, 11, 11]])
    assert item["action_is_pad"].tolist() == [False, False, True, True]
    assert not dataset.numbers(12)["action_is_pad"].any()


def test_numbers_equal_the_item_without_images(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_video", action_horizon=4)
    item, numbers = dataset[7], dataset.numbers(7)
    assert set(item) - set(numbers) == set(dataset.camera_keys)
    assert all(np.array_equal(item[key], value) for key, value in numbers.items())


def test_changing_an_item_leaves_the_dataset_unchanged(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=2)
    before = dataset[0]
    for value in dataset[0].values():
        if isinstance(value, np.ndarray):
            value[...] = 0
    assert all(np.array_equal(dataset[0][key], value) for key, value in before.items())


def test_dataset_is_a_sequence(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=2)
    assert dataset[-1]["index"] == dataset[np.int64(35)]["index"] == 35
    for index in (36, -37):
        with pytest.raises(IndexError, match=f"no frame {index}.*has 36"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset["action"]
    assert sum(1 for _ in dataset) == 36


@pytest.mark.parametrize("name", SETS)
def test_only_selected_episodes_are_read(name, golden_sets):
    dataset = LeRobotDataset(golden_sets / name, action_horizon=3)
    part = LeRobotDataset(golden_sets / name, action_horizon=3, episodes=[1])
    first = dataset.episode_lengths[0]
    assert part.episode_indices == (1,)
    assert len(part) == part.episode_lengths[0] == dataset.episode_lengths[1]
    for i in (0, len(part) - 1):
        expected, found = dataset[first + i], part[i]
        assert all(np.array_equal(found[key], value) for key, value in expected.items())


def test_selected_episodes_keep_the_order_of_the_dataset(golden_sets):
    part = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=1, episodes=(2, 0))  # in the dataset's order
    assert part.columns["index"].tolist() == [*range(12), *range(21, 36)]
    assert part[12]["index"] == 21


@pytest.mark.parametrize("name", SETS)
def test_threads_read_the_same_images(name, golden_sets):
    dataset = LeRobotDataset(golden_sets / name, action_horizon=1)
    indices = np.random.default_rng(0).integers(0, len(dataset), 60).tolist()
    expected = [dataset[i][BASE] for i in indices]
    start = threading.Barrier(4)

    def read(_):
        start.wait()
        return [dataset[i][BASE] for i in indices]

    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(found, expected) for found in threads.map(read, range(4)))


@pytest.mark.parametrize("name", SETS)
def test_pickled_dataset_reads_the_same_items(name, golden_sets):
    dataset = LeRobotDataset(golden_sets / name, action_horizon=2)
    item = dataset[5]  # opens the files
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(np.array_equal(copy[5][key], value) for key, value in item.items())


@pytest.mark.skipif(sys.platform == "win32", reason="There is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_process_reads_the_same_images(golden_sets):
    """File positions are shared with the parent process, buffered reads are not."""
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_video", action_horizon=1)
    expected = [dataset[i][BASE] for i in range(36)]
    dataset[3]
    child = os.fork()
    if child == 0:
        right = all(np.array_equal(dataset[i][BASE], expected[i]) for i in reversed(range(36)))
        os._exit(0 if right else 1)
    found = [dataset[i][BASE] for i in range(36)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(found, expected)


def test_frames_in_order_are_decoded_without_seeking(golden_sets, monkeypatch):
    dataset = LeRobotDataset(golden_sets / "lerobot_v21", action_horizon=1, episodes=[0])
    seeks = []
    reader_class = sys.modules["torchpi.data.video"].VideoReader
    seek = reader_class._seek
    monkeypatch.setattr(reader_class, "_seek", lambda self, seconds: (seeks.append(seconds), seek(self, seconds)))
    for i in range(len(dataset)):
        dataset[i]
    assert len(seeks) <= 2 * 2  # per camera: the first frame, and one until the keyframe distance is known


def test_frames_between_distant_keyframes_are_found(tmp_path):
    """Other encoders write a keyframe every few seconds, and frames that refer to later ones."""
    frames = np.random.default_rng(0).integers(0, 256, (40, 1, 1, 3), np.uint8) * np.ones((1, 32, 32, 1), np.uint8)
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"g": "15", "bf": "2"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "video.mp4")) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pool = VideoPool()
    for i in (*range(40), *np.random.default_rng(1).permutation(40).tolist()):
        assert np.array_equal(pool.read(tmp_path / "video.mp4", i / 30, 0.25 / 30, 1 / 30), expected[i])


def test_image_cache_is_bounded(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=1, image_cache_bytes=1)
    unbounded = LeRobotDataset(golden_sets / "lerobot_v3_image", action_horizon=1)
    for i in (0, 30, 15, 1):
        assert np.array_equal(dataset[i][BASE], unbounded[i][BASE])
    assert len(dataset._images._row_groups) == 1


def test_number_of_open_videos_is_bounded(golden_sets):
    dataset = LeRobotDataset(golden_sets / "lerobot_v21", action_horizon=1)
    dataset._videos = VideoPool(limit=1)
    for i in (0, 60, 1):
        dataset[i]
    assert len(dataset._videos._idle) == 1


def test_older_name_of_the_tasks_index_is_read(copy_of):
    root = copy_of("lerobot_v3_image")
    change_columns(
        root / "meta/tasks.parquet",
        lambda columns: {"task_index": columns["task_index"], "__index_level_0__": columns["task"]},
    )
    assert LeRobotDataset(root, action_horizon=1)[15]["task"] == "Press a button from the top"


def test_lists_of_any_kind_become_float32(copy_of):
    """Older datasets have lists without a fixed length, and float64."""
    root = copy_of("lerobot_v3_video")
    expected = LeRobotDataset(root, action_horizon=2)[3]

    def change(columns):
        kind = pa.list_(pa.float64())
        return {**columns, **{key: columns[key].cast(kind) for key in ("action", "observation.state")}}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    found = LeRobotDataset(root, action_horizon=2)[3]
    for key in ("action", "observation.state"):
        assert np.array_equal(found[key], expected[key])
        assert found[key].dtype == np.float32


def test_dimension_names_are_read_from_a_group(copy_of):
    root = copy_of("lerobot_v3_video")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"]["names"] = {"motors": ["a", "b", "c", "d"]}
    features["observation.state"]["names"] = None
    change_json(root / "meta/info.json", features=features)
    dataset = LeRobotDataset(root, action_horizon=2)
    assert dataset.action_names == ("a", "b", "c", "d")
    assert dataset.state_names is None


def test_version_2_0_is_read_like_2_1(copy_of):
    """It has statistics of the dataset instead of each episode; neither are read."""
    root = copy_of("lerobot_v21")
    expected = LeRobotDataset(root, action_horizon=4)
    change_json(root / "meta/info.json", codebase_version="v2.0")
    (root / "meta/episodes_stats.jsonl").unlink()
    (root / "meta/stats.json").write_text("{}")
    found = LeRobotDataset(root, action_horizon=4)
    assert len(found) == len(expected)
    for i in (0, 60, len(found) - 1):
        assert all(np.array_equal(found[i][key], value) for key, value in expected[i].items())


WRIST = "observation.images.wrist"


def test_only_selected_cameras_are_decoded(copy_of, monkeypatch):
    root = copy_of("lerobot_v3_video")
    shutil.rmtree(root / "videos" / BASE)
    dataset = LeRobotDataset(root, action_horizon=1, cameras=[WRIST])
    assert dataset.camera_keys == (WRIST,)
    reads = []
    read = VideoPool.read
    monkeypatch.setattr(VideoPool, "read", lambda self, path, *args: (reads.append(path), read(self, path, *args))[1])
    assert set(dataset[3]) & {BASE, WRIST} == {WRIST}
    assert reads == [root / "videos" / WRIST / "chunk-000/file-000.mp4"]
    assert LeRobotDataset(root, action_horizon=1, cameras=()).camera_keys == ()


def test_camera_keys_of_returns_the_cameras_that_the_robot_reads():
    cameras = (Camera("a", "images.front"), Camera("b", "side", "optional"), Camera(None, "top", "ignored"))
    robot = Embodiment.generic("arm", cameras={"a": "x"}, state=["x"], actions=["x"])
    robot = Embodiment("arm", cameras, robot.state, robot.actions)
    front, side, top = (f"observation.images.{name}" for name in ("front", "side", "top"))
    assert camera_keys_of(robot, [top, front, side]) == [front, side]
    assert camera_keys_of(robot, [front]) == [front]
    with pytest.raises(
        KeyError, match=r"no camera for images\.front, which embodiment 'arm' requires; its cameras are side"
    ):
        camera_keys_of(robot, [side])
    assert camera_keys_of(get_embodiment("metaworld"), [BASE, WRIST, top]) == [BASE, WRIST]


def test_only_selected_columns_are_read(copy_of):
    root = copy_of("lerobot_v3_image")

    def change(columns):
        return {**columns, "reward": pa.array([float("nan")] * 36), "tactile": columns["action"]}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    assert {"reward", "tactile"} <= set(LeRobotDataset(root, action_horizon=1).columns)
    few = LeRobotDataset(root, action_horizon=1, columns=["reward"])
    assert set(few.columns) == {
        "observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index", "reward"
    }  # fmt: skip


# Renamed columns and cameras

OPENPI = {"observation.state": "state", "action": "actions", BASE: "image", WRIST: "wrist_image"}
RENAME = {"state": "observation.state", "actions": "action", "image": BASE, "wrist_image": WRIST}


def rename_files(root, names):
    """Rename columns and cameras in all files of a dataset."""
    info = json.loads((root / "meta/info.json").read_text())
    features = {names.get(key, key): feature for key, feature in info["features"].items()}
    change_json(root / "meta/info.json", features=features)

    def new_name(column):  # "action", "videos/KEY/from_timestamp"
        return "/".join(names.get(part, part) for part in column.split("/"))

    for path in (*root.glob("data/*/*.parquet"), *root.glob("meta/episodes/*/*.parquet")):
        change_columns(path, lambda columns: {new_name(key): values for key, values in columns.items()})
    for path in [path for key in names for path in root.glob(f"videos/**/{key}")]:
        path.rename(path.with_name(names[path.name]))


@pytest.fixture
def otherwise_named(copy_of):
    """A function that copies a golden dataset with the names of openpi's datasets."""

    def copy(name):
        rename_files(root := copy_of(name), OPENPI)
        return root

    return copy


@pytest.mark.parametrize("name", SETS)
def test_renamed_dataset_equals_the_original(name, golden_sets, otherwise_named):
    expected = LeRobotDataset(golden_sets / name, action_horizon=3)
    found = LeRobotDataset(otherwise_named(name), action_horizon=3, rename=RENAME)
    assert found.camera_keys == expected.camera_keys
    assert found.features == expected.features
    assert (found.state_names, found.action_names) == (expected.state_names, expected.action_names)
    assert set(found.columns) == set(expected.columns)
    for dataset in (found, pickle.loads(pickle.dumps(found))):
        for i in (0, 20, len(found) - 1):
            assert set(dataset[i]) == set(expected[i])
            assert all(np.array_equal(dataset[i][key], value) for key, value in expected[i].items())


def test_arguments_take_the_new_names(otherwise_named):
    root = otherwise_named("lerobot_v3_image")
    part = LeRobotDataset(root, action_horizon=1, cameras=[WRIST], columns=(), rename=RENAME)
    assert part.camera_keys == open_metadata(root, rename={"wrist_image": WRIST}).info.cameras[1:] == (WRIST,)
    refused(root, KeyError, f"no camera wrist_image; its cameras are {BASE}", cameras=["wrist_image"], rename=RENAME)


def test_cameras_may_swap_their_names(golden_sets):
    swapped = LeRobotDataset(
        golden_sets / "lerobot_v3_video", action_horizon=1, rename={BASE: WRIST, WRIST: BASE}, columns=()
    )[5]
    plain = LeRobotDataset(golden_sets / "lerobot_v3_video", action_horizon=1)[5]
    assert np.array_equal(swapped[BASE], plain[WRIST])
    assert np.array_equal(swapped[WRIST], plain[BASE])
    assert not np.array_equal(plain[BASE], plain[WRIST])


def test_error_suggests_names_for_missing_columns(otherwise_named):
    root = otherwise_named("lerobot_v3_image")
    both = "--rename state=observation.state actions=action, or"
    refused(root, KeyError, f"no column observation.state, action; its columns and cameras are .*wrist_image.*{both}")
    refused(root, KeyError, f"no column action; .*{both}", rename={"state": "observation.state"})
    change_json(root / "meta/info.json", features={"pose": {}, "actions": {}})
    refused(root, KeyError, "--rename NAME=observation.state actions=action, or")


def test_error_suggests_an_unread_camera_for_a_missing_one():
    option = r"--rename observation\.images\.top=observation\.images\.cam_high, or"
    with pytest.raises(KeyError, match=rf"no camera for images\.cam_high.*its cameras are top\. .*{option}"):
        camera_keys_of(get_embodiment("aloha"), ["observation.images.top"])
    frame = {key: np.zeros((2, 2, 3), np.uint8) for key in ("left", "right")}
    with pytest.raises(KeyError, match=r"if left or right is this camera.*--rename NAME=observation\.images\.base"):
        to_observation(frame, get_embodiment("metaworld"))


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        ({"pose": "state"}, KeyError, "no pose to rename; its columns and cameras are .*observation.state"),
        (
            {"action": "observation.state"},
            ValueError,
            "can't be renamed to observation.state: the dataset has",
        ),
        (
            {BASE: "eye", WRIST: "eye"},
            ValueError,
            f"{WRIST} .* can't be renamed to eye: {BASE} is renamed to it as well",
        ),
        ({"action": "task"}, ValueError, "can't be renamed to task: the reader adds it"),
    ],
)
def test_impossible_renames_are_errors(rename, error, message, golden_sets):
    refused(golden_sets / "lerobot_v3_image", error, message, rename=rename)


def test_parse_rename():
    assert parse_rename(["state=observation.state", "actions=action"]) == {
        "state": "observation.state", "actions": "action"
    }  # fmt: skip
    assert parse_rename([]) == {}
    for value in ("state", "=action", "state=", "a=b=c"):
        with pytest.raises(ValueError, match=f"'{value}' is not a renaming; expected OLD=NEW"):
            parse_rename([value])
    with pytest.raises(ValueError, match="a is renamed twice, to b and to c"):
        parse_rename(["a=b", "a=c"])


def test_files_of_an_address_are_downloaded_under_their_own_names(otherwise_named, monkeypatch):
    root, fetched = otherwise_named("lerobot_v3_video"), []
    monkeypatch.setattr(
        "torchpi.checkpoints.hub.fetch_dataset", lambda address, files: (fetched.append((address, files)), root)[1]
    )
    refused("hf://org/name", KeyError, "--rename state=observation.state actions=action")
    assert fetched == [("hf://org/name", ["meta/"])]  # no large files
    LeRobotDataset("hf://org/name", action_horizon=1, cameras=[WRIST], rename=RENAME)[0]
    files = ["data/chunk-000/file-000.parquet", "videos/wrist_image/chunk-000/file-000.mp4"]
    assert fetched[-1] == ("hf://org/name", files)


def test_openpi_libero_dataset_is_read(tmp_path):
    """Its columns and cameras, see openpi's examples/libero/convert_libero_data_to_lerobot.py."""
    state, action = np.arange(8, dtype=np.float32), np.ones(7, np.float32)
    images = {f"observation.images.{name}": np.full((8, 8, 3), i, np.uint8) for i, name in enumerate(("base", "wrist"))}
    names = {"state_names": list("abcdefgh"), "action_names": list("abcdefg")}
    with LeRobotWriter(tmp_path / "set", fps=10, cameras={"base": (8, 8, 3), "wrist": (8, 8, 3)}, **names) as writer:
        writer.add_frame({**images, "observation.state": state, "action": action})
        writer.save_episode("put the bowl on the plate")
    rename_files(tmp_path / "set", OPENPI)
    rename = parse_rename(["state=observation.state", "actions=action"])
    robot = get_embodiment("libero")
    cameras = camera_keys_of(robot, open_metadata(tmp_path / "set", rename=rename).info.cameras)
    dataset = LeRobotDataset(tmp_path / "set", action_horizon=2, cameras=cameras, rename=rename)
    found = to_observation(dataset[0], robot)
    assert np.array_equal(found["observation/state"], state)
    assert np.array_equal(found["actions"], np.stack([action] * 2))
    assert found["observation/image"].max() == 0
    assert found["observation/wrist_image"].min() == 1
    assert found["prompt"] == "put the bowl on the plate"


def test_eval_of_a_renamed_dataset_is_the_same(golden_sets, otherwise_named, capsys):
    common = ["--select", "task: press*", "--samples", "2", "--num-steps", "1", "--device", "cpu", "--json"]
    cli.main(["eval", "demo", "--dataset", str(golden_sets / "lerobot_v3_image"), *common])
    expected = json.loads(capsys.readouterr().out)
    assert expected["episodes"] == [1]
    root = str(otherwise_named("lerobot_v3_image"))
    cli.main(["eval", "demo", "--dataset", root, *common, "--rename", *(f"{old}={new}" for old, new in RENAME.items())])
    found = json.loads(capsys.readouterr().out)
    assert found == {**expected, "dataset": root, "seconds": found["seconds"]}
    with pytest.raises(SystemExit):
        cli.main(["eval", "demo", "--env", "metaworld", "--select", "1", "--rename", "a=b"])
    assert "--rename, --select can only be given with --dataset" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor demo", "quantize demo --to int8 --out new"])
def test_dataset_options_without_a_dataset_are_errors(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--select", "1", "--rename", "a=b"])
    assert "--rename, --select can only be given with --dataset" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_stats_of_a_renamed_dataset_are_the_same(golden_sets, otherwise_named, capsys):
    common = ["--embodiment", "metaworld", "--action-horizon", "4", "--json"]
    cli.main(["stats", str(golden_sets / "lerobot_v3_image"), *common])
    expected = json.loads(capsys.readouterr().out)
    root = str(otherwise_named("lerobot_v3_image"))
    cli.main(["stats", root, *common, "--rename", "state=observation.state", "actions=action"])
    assert json.loads(capsys.readouterr().out) == {**expected, "dataset": root}


# Errors


def refused(root, error, match, **arguments):
    with pytest.raises(error, match=match):
        LeRobotDataset(root, **{"action_horizon": 2, **arguments})


def test_missing_folder_is_an_error(tmp_path):
    refused(tmp_path / "nothing", FileNotFoundError, r"no folder .*nothing")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", ValueError, r"file is a file, not a dataset's folder")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "link", ValueError, r"link is a broken link, not a dataset's folder")


def test_folder_without_info_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, FileNotFoundError, r"not a LeRobot dataset.*meta/info\.json; found model\.safetensors")


def test_unsupported_version_is_an_error(copy_of):
    root = copy_of("lerobot_v21")
    change_json(root / "meta/info.json", codebase_version="v1.6")
    refused(root, ValueError, r"version is 'v1\.6'; the supported versions are v3\.0, v2\.1, v2\.0")


def test_dataset_without_episodes_is_an_error(copy_of):
    """As left by LeRobot before the first episode is saved."""
    root = copy_of("lerobot_v3_image")
    change_json(root / "meta/info.json", total_episodes=0, total_frames=0)
    (root / "meta/tasks.parquet").unlink()
    shutil.rmtree(root / "meta/episodes")
    refused(root, ValueError, "has no episodes")


def test_unknown_camera_is_an_error(golden_sets):
    refused(golden_sets / "lerobot_v3_video", KeyError, f"no camera top; its cameras are {BASE}", cameras=["top", BASE])


@pytest.mark.parametrize("column", ["observation.state", "action"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_errors(column, value, copy_of):
    root = copy_of("lerobot_v3_video")

    def change(columns):
        rows = np.array(columns[column].to_pylist())
        rows[[17, 20], 2] = value  # in episode 1, which starts at row 12
        return {**columns, column: pa.array(rows.tolist(), columns[column].type)}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    message = rf"file-000\.parquet: {column} is NaN or infinite in frame 5 of episode 1, dimension 2, and in 2 of its 9"
    refused(root, ValueError, message)
    assert len(LeRobotDataset(root, action_horizon=1, episodes=[0, 2])) == 27


@pytest.mark.parametrize(
    ("clock", "message"),
    [
        (lambda t: t * 8, r"frame 1 of episode 0 was taken 0\.1000 s after .* expected 0\.0125 s ± 0\.0031.*has 10\."),
        (lambda t: t * 1.05, r"frame 6 of episode 0 .* has 76\.19"),
        (lambda t: t + (t > 0.07) / 80, "frame 6 of episode 0"),  # a frame is missing
        (lambda t: np.where(t > 0.05, np.nan, t), "frame 5 of episode 0"),
    ],
)
def test_timestamps_that_do_not_fit_fps_are_errors(clock, message, copy_of):
    root = copy_of("lerobot_v3_image")

    def change(columns):
        seconds = np.array(columns["timestamp"], np.float32)
        seconds[:12] = clock(seconds[:12])
        return {**columns, "timestamp": pa.array(seconds)}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    refused(root, ValueError, rf"file-000\.parquet: {message}")
    assert LeRobotDataset(root, action_horizon=1, episodes=[1, 2]).episode_indices == (1, 2)


def test_clock_may_start_at_any_time(copy_of):
    root = copy_of("lerobot_v3_image")

    def change(columns):
        return {**columns, "timestamp": pa.array(np.array(columns["timestamp"], np.float32) + np.float32(100.3))}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    assert LeRobotDataset(root, action_horizon=1)[0]["timestamp"] == np.float32(100.3)


@pytest.mark.parametrize("text", ["{", "[]", '{"codebase_version": "v3.0"}'])
def test_damaged_info_is_an_error(text, copy_of):
    root = copy_of("lerobot_v3_image")
    (root / "meta/info.json").write_text(text)
    refused(root, ValueError, r"info\.json")


@pytest.mark.parametrize("column", ["observation.state", "action"])
def test_missing_column_is_an_error(column, copy_of):
    root = copy_of("lerobot_v3_video")
    change_columns(
        root / "data/chunk-000/file-000.parquet",
        lambda columns: {name: values for name, values in columns.items() if name != column},
    )
    refused(root, KeyError, f"no column {column}; its numeric columns are .*timestamp")


MISSING = [
    ("lerobot_v3_image", "data/chunk-000/file-000.parquet"),
    ("lerobot_v3_image", "meta/tasks.parquet"),
    ("lerobot_v3_image", "meta/episodes/chunk-000/file-000.parquet"),
    ("lerobot_v3_video", "videos/observation.images.wrist/chunk-000/file-000.mp4"),
    ("lerobot_v21", "data/chunk-000/episode_000001.parquet"),
    ("lerobot_v21", "videos/chunk-000/observation.images.base/episode_000001.mp4"),
    ("lerobot_v21", "meta/tasks.jsonl"),
    ("lerobot_v21", "meta/episodes.jsonl"),
]


@pytest.mark.parametrize(("name", "file"), MISSING)
def test_missing_file_is_an_error(name, file, copy_of):
    root = copy_of(name)
    (root / file).unlink()
    refused(root, FileNotFoundError, file.removesuffix("/chunk-000/file-000.parquet").replace(".", r"\."))


@pytest.mark.parametrize(("name", "file"), [entry for entry in MISSING if "videos" not in entry[1]])
def test_truncated_file_is_an_error(name, file, copy_of):
    root = copy_of(name)
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: len(content) // 2])
    refused(root, ValueError, f"{file}|info.json states total_episodes 2 and total_frames 151, but .* has 1 with 45")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("lerobot_v3_image", "data/chunk-000/file-000.parquet"),
        ("lerobot_v21", "data/chunk-000/episode_000001.parquet"),
        ("lerobot_v21", "videos/chunk-000/observation.images.base/episode_000001.mp4"),
    ],
)
def test_file_with_a_hole_is_an_error(name, file, copy_of):
    """Beginning and end are right, as after an incomplete parallel download."""
    root = copy_of(name)
    content = bytearray((root / file).read_bytes())
    hole = slice(int(0.3 * len(content)), int(0.6 * len(content)))
    content[hole] = bytes(len(content[hole]))
    (root / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} .*damaged") as caught:  # noqa: PT012
        dataset = LeRobotDataset(root, action_horizon=1)
        [dataset[i] for i in range(len(dataset))]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_truncated_video_is_an_error(keep, copy_of):
    root = copy_of("lerobot_v3_video")
    file = root / "videos/observation.images.base/chunk-000/file-000.mp4"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    dataset = LeRobotDataset(root, action_horizon=1)
    with pytest.raises(ValueError, match=r"images\.base/chunk-000/file-000\.mp4 .*damaged"):
        [dataset[i] for i in range(len(dataset))]


def test_missing_video_frame_is_an_error(golden_sets):
    """There is no frame between two frames, nor past the end."""
    path = golden_sets / "lerobot_v3_video/videos/observation.images.base/chunk-000/file-000.mp4"
    for seconds in (0.5 / 80, 1.0):
        with pytest.raises(ValueError, match=r"file-000\.mp4 has no frame at.*: the nearest one is at"):
            VideoPool().read(path, seconds, 0.25 / 80, 1 / 80)


@pytest.mark.parametrize("name", ["lerobot_v3_video", "lerobot_v21", "lerobot_v3_image"])
def test_check_videos_reads_every_video(name, copy_of):
    root = copy_of(name)
    seen = []
    LeRobotDataset(root, action_horizon=1).check_videos(lambda done, total: seen.append((done, total)))
    count = len(list(root.rglob("*.mp4")))
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_check_videos_finds_an_episode_past_the_end(copy_of):
    root = copy_of("lerobot_v3_video")
    late = [0.0, 0.0, 1 / 80]
    change_columns(
        root / "meta/episodes/chunk-000/file-000.parquet",
        lambda columns: {
            **columns,
            **{key: later(columns[key], late) for key in columns if key.endswith("/from_timestamp")},
        },
    )
    dataset = LeRobotDataset(root, action_horizon=1)
    with pytest.raises(
        ValueError, match=r"episode 2, from 0\.2750 s \(from_timestamp\) on, has 14 frames instead of 15"
    ):
        dataset.check_videos()
    LeRobotDataset(root, action_horizon=1, episodes=[0, 1]).check_videos()


def later(column, seconds):
    return pa.array(np.add(column.to_numpy(zero_copy_only=False), seconds))


def test_damaged_image_is_an_error(copy_of):
    root = copy_of("lerobot_v3_image")

    def change(columns):
        images = [dict(image) for image in columns[BASE].to_pylist()]
        images[1]["bytes"] = images[1]["bytes"][:500]
        images[2]["bytes"] = None
        return {**columns, BASE: pa.array(images, columns[BASE].type)}

    change_columns(root / "data/chunk-000/file-000.parquet", change)
    dataset = LeRobotDataset(root, action_horizon=1)
    dataset[0]
    whose = rf"{BASE} of episode 0, frame 1 can't be read: .*"
    with pytest.raises(ValueError, match=rf"{whose}file-000\.parquet: the image of {BASE} in row 1 is damaged"):
        dataset[1]
    with pytest.raises(FileNotFoundError, match=r"file-000\.parquet, row 2 names the image frame-000002\.png, which"):
        dataset[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 30), "episode 2 has 9 frames, numbered 0 to 8; expected 0 to 14"),
        (lambda table: table.slice(12), "no frame of episode 0"),
        (lambda table: pa.concat_tables([table.slice(5, 7), table]), "not contiguous|episode 0 has 19 frames"),
        (lambda table: pa.concat_tables([table, table.slice(0, 3)]), "not contiguous"),
    ],
)
def test_data_that_contradict_metadata_are_errors(change, message, copy_of):
    root = copy_of("lerobot_v3_video")
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    refused(root, ValueError, rf"file-000\.parquet.*({message})")


@pytest.mark.parametrize(
    "change",
    [
        lambda columns: {name: column.slice(0, 1) for name, column in columns.items()},
        lambda columns: {**columns, "task": pa.array([columns["task"][0], None])},
    ],
)
def test_task_without_an_instruction_is_an_error(change, copy_of):
    root = copy_of("lerobot_v3_image")
    change_columns(root / "meta/tasks.parquet", change)
    message = r"9 frames, the first in episode 1, have the task_index 1, for which .*tasks\.parquet has no text"
    refused(root, ValueError, message)
    assert len(LeRobotDataset(root, action_horizon=1, episodes=[0, 2])) == 27


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("episode_index", [0, 1, 1], "has the episodes 1 more than once"),
        ("length", [12, None, 15], "has None as the length of episode 1; expected a whole number"),
    ],
)
def test_impossible_list_of_episodes_is_an_error(column, values, message, copy_of):
    root = copy_of("lerobot_v3_image")
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    change_columns(path, lambda columns: {**columns, column: pa.array(values)})
    refused(root, ValueError, message)


def test_data_files_with_other_dimensions_are_errors(copy_of):
    root = copy_of("lerobot_v3_image")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    wider = [[*row, 0.0] for row in table.column("action").to_pylist()[21:]]
    pq.write_table(table.slice(0, 21), path)
    last = table.slice(21).to_pydict() | {"action": pa.array(wider, pa.list_(pa.float32()))}
    pq.write_table(pa.table(last), path.with_name("file-001.parquet"))
    change_columns(
        root / "meta/episodes/chunk-000/file-000.parquet",
        lambda columns: {**columns, "data/file_index": pa.array([0, 0, 1])},
    )
    refused(
        root,
        ValueError,
        r"file-001\.parquet: action has the shape \[5\] per frame, and the shape \[4\] in the previous data files",
    )
    assert len(LeRobotDataset(root, action_horizon=1, episodes=[0, 1])) == 21


def test_impossible_features_are_errors(copy_of):
    root = copy_of("lerobot_v3_video")
    change_json(root / "meta/info.json", video_path=None)
    refused(root, ValueError, r"observation\.images\.base is a video, but video_path is None; expected a path template")
    change_json(root / "meta/info.json", features={"action": "float32"})
    refused(root, ValueError, "the feature action is 'float32'; expected an object")


@pytest.mark.parametrize(
    ("episodes", "message"),
    [([0, 3], "no episode 3; its episodes are 0 to 2"), ([-1], "no episode -1"), ([], "episodes= is empty")],
)
def test_unknown_episodes_are_errors(episodes, message, golden_sets):
    refused(golden_sets / "lerobot_v3_image", ValueError, message, episodes=episodes)


@pytest.mark.parametrize("horizon", [0, 2.5, None])
def test_invalid_action_horizon_is_an_error(horizon, golden_sets, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, without type checks
    refused(golden_sets / "lerobot_v3_image", ValueError, f"action_horizon is {horizon}", action_horizon=horizon)


def test_missing_library_is_an_error_with_the_install_command(golden_sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(golden_sets / "lerobot_v3_image", ModuleNotFoundError, r"pip install 'torchpi\[data\]'")
