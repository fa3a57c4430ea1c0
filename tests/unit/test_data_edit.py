"""`torchpi data merge | split | delete | resample`: the right frames and numbers, written completely or not at all."""

import dataclasses
import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_helpers import (
    NAMES,
    change_info,
    change_rows,
    copied,
    encode_without_keyframes,
    numbered_set,
    numbers_of,
)
from numbered_set import FRONT, read_number
from pixel_sets import encoded_video, some_picture, turned_video, write_set

from torchpi import cli
from torchpi.data import LeRobotDataset, LeRobotWriter, recording, rewrite
from torchpi.data.edit import delete_episodes, merge_datasets, resample_dataset, split_dataset
from torchpi.data.metadata import open_metadata
from torchpi.data.metadata_writer import merged_stats
from torchpi.robots import ActionDim, Embodiment

UNSTATED = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=NAMES, actions=NAMES)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(recording.os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Episodes of 5, 3 and 4 frames, as video."""
    return numbered_set(tmp_path_factory.mktemp("sets") / "videos")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return numbered_set(tmp_path_factory.mktemp("sets") / "images", video=False)


def ramp(episode, frames):
    return [1000 * episode + t for t in frames]


def test_merged_datasets_are_concatenated(videos, tmp_path):
    other = numbered_set(tmp_path / "other", (2, 6), first=7, tasks=["open it", "push it"])
    result = merge_datasets([videos, other], tmp_path / "new")
    assert (result.episodes, result.frames, result.videos_copied, result.videos_encoded) == (5, 20, 5, 0)
    assert numbers_of(tmp_path / "new") == [ramp(e, range(n)) for e, n in ((0, 5), (1, 3), (2, 4), (7, 2), (8, 6))]
    metadata = open_metadata(tmp_path / "new")
    assert list(metadata.tasks.values()) == ["push it", "lift it", "open it"]
    assert [episode.tasks for episode in metadata.episodes] == [
        (task,) for task in ("push it", "lift it", "push it", "open it", "push it")
    ]
    assert metadata.info.robot_type == "my_arm"
    assert not list(tmp_path.glob(".*"))


def test_statistics_of_a_merged_dataset(videos, tmp_path):
    other = numbered_set(tmp_path / "other", (2,), first=7)
    merge_datasets([videos, other], tmp_path / "new")
    stats = json.loads((tmp_path / "new/meta/stats.json").read_text())
    states = LeRobotDataset(tmp_path / "new", action_horizon=1, cameras=()).columns["observation.state"]
    assert np.allclose(stats["observation.state"]["mean"], states.mean(axis=0))
    assert np.allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0))
    parts = [json.loads((path / "meta/stats.json").read_text())[FRONT] for path in (videos, other)]
    mean = (12 * np.array(parts[0]["mean"]) + 2 * np.array(parts[1]["mean"])) / 14
    assert np.allclose(stats[FRONT]["mean"], mean)
    assert stats[FRONT]["count"] == [14]


def test_merged_statistics_equal_those_of_all_values():
    values = np.random.default_rng(0).normal(size=(30, 3, 1, 1))

    def of(part):
        found = {"min": part.min(0), "max": part.max(0), "mean": part.mean(0), "std": part.std(0)}
        return {name: array.tolist() for name, array in found.items()} | {"count": [len(part)]}

    merged, expected = merged_stats([of(values[:7]), of(values[7:])]), of(values)
    assert all(np.allclose(merged[name], expected[name]) for name in expected)
    assert merged_stats([of(values), {}]) == {}


def test_deleted_episodes_are_gone_and_the_others_renumbered(images, tmp_path):
    delete_episodes(images, tmp_path / "new", "1")
    assert numbers_of(tmp_path / "new") == [ramp(0, range(5)), ramp(2, range(4))]
    assert numbers_of(images) == [ramp(0, range(5)), ramp(1, range(3)), ramp(2, range(4))]


def test_split_by_expression_and_by_fraction(videos, tmp_path):
    results = split_dataset(videos, tmp_path / "parts", {"lift": "task:lift*", "push": "task:push*"})
    assert [(result.path, result.episodes) for result in results] == [
        (str(tmp_path / "parts" / name), count) for name, count in (("lift", 1), ("push", 2))
    ]
    assert numbers_of(tmp_path / "parts/push") == [ramp(0, range(5)), ramp(2, range(4))]
    split_dataset(videos, tmp_path / "fractions", {"train": "0.67", "val": ".33"})
    assert len(numbers_of(tmp_path / "fractions/train")) == 2
    assert numbers_of(tmp_path / "fractions/val") == [ramp(2, range(4))]


@pytest.mark.parametrize("is_video", [True, False])
def test_resampled_frames_are_the_nearest_and_increments_are_summed(is_video, videos, images, tmp_path):
    source = videos if is_video else images
    resample_dataset(source, tmp_path / "new", 4, commands=["position", "position", "increment"])
    dataset = LeRobotDataset(tmp_path / "new", action_horizon=1)
    # 10 Hz to 4 Hz: times 0, 0.25 of 0 to 0.4 s: frames 0, 2 (2.5 is nearest to both; the even one)
    assert dataset.fps == 4
    assert dataset.columns["observation.state"][:, 0].tolist() == [0, 2, 1000, 2000, 2002]
    assert np.allclose(dataset.columns["timestamp"], [0, 0.25, 0, 0, 0.25])
    actions = dataset.columns["action"]
    assert actions[:, 0].tolist() == [0, 2, 1000, 2000, 2002]
    halves = [0 + 1 + 2 / 2, 2 / 2 + 3 + 4, 1000 + 1001 + 1002 / 2, 2000 + 2001 + 2002 / 2, 2002 / 2 + 2003]
    assert actions[:, 2].tolist() == halves  # 0.25 s are two and a half frames
    assert [read_number(dataset[i][FRONT]) for i in range(5)] == [0, 2, 1000, 2000, 2002]


def test_commands_of_a_robot_are_matched_by_action_names(tmp_path):
    actions = (ActionDim("turn", command="increment"), ActionDim("lift", command="position"))
    robot = dataclasses.replace(
        Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=["lift"], actions=["lift"]), actions=actions
    )
    with LeRobotWriter(
        tmp_path / "set", fps=10, cameras={}, state_names=["lift"], action_names=["lift", "turn"]
    ) as writer:
        values = np.repeat(np.arange(1, 5, dtype=np.float32)[:, None], 2, axis=1)
        writer.add_episode({"observation.state": values[:, :1], "action": values}, "go")
    resample_dataset(tmp_path / "set", tmp_path / "new", 5, commands=robot)
    actions = LeRobotDataset(tmp_path / "new", action_horizon=1).columns["action"]
    assert actions.tolist() == [[1, 1 + 2], [3, 3 + 4]]
    wrong = dataclasses.replace(robot, actions=(robot.actions[0], ActionDim("wrist", command="position")))
    with pytest.raises(ValueError, match=r"action has lift, turn; embodiment 'arm' has turn, wrist: "):
        resample_dataset(tmp_path / "set", tmp_path / "other", 5, commands=wrong)


def test_episode_without_its_own_keyframe_is_reencoded(videos, tmp_path):
    source = copied(videos, tmp_path / "source")
    encode_without_keyframes(source)
    result = merge_datasets([videos, source], tmp_path / "new")
    assert (result.videos_copied, result.videos_encoded) == (
        3 + 1,
        2,
    )  # the first episode of a file starts with a keyframe
    episodes = [ramp(0, range(5)), ramp(1, range(3)), ramp(2, range(4))]
    assert numbers_of(tmp_path / "new") == episodes * 2
    assert len(list((tmp_path / "new/videos").rglob("*.mp4"))) > 1  # videos with different codecs are not merged


def test_older_formats_become_v3(golden_root, tmp_path):
    source = golden_root / "datasets/lerobot_v21"
    result = merge_datasets([source], tmp_path / "new")
    assert result.videos_encoded == 0
    old, new = (LeRobotDataset(path, action_horizon=4) for path in (source, tmp_path / "new"))
    assert open_metadata(tmp_path / "new").info.is_v3
    for i in (0, len(old) - 1):
        assert old[i].keys() == new[i].keys()
        assert all(np.array_equal(old[i][key], new[i][key]) for key in old[i])


def test_clock_that_starts_later_is_shifted_to_zero(videos, tmp_path):
    source = copied(videos, tmp_path / "source")
    (file,) = source.glob("data/*/*.parquet")
    place = pq.read_schema(file).get_field_index("timestamp")
    change_rows(file, lambda t: t.set_column(place, "timestamp", pa.compute.add(t["timestamp"].cast("double"), 1e9)))
    delete_episodes(source, tmp_path / "new", "0")
    assert numbers_of(tmp_path / "new") == [ramp(1, range(3)), ramp(2, range(4))]


def test_extra_files_columns_and_features_are_kept(videos, tmp_path):
    source = copied(videos, tmp_path / "source")
    (source / "meta/modality.json").write_text("{}")
    (file,) = source.glob("meta/episodes/*/*.parquet")
    change_rows(file, lambda table: table.append_column("operator", pa.array(["ann", "bob", "cy"])))
    (file,) = source.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.append_column("note", pa.array(["x"] * len(table))))
    change_info(source, features={**open_metadata(source).info.features, "note": {"dtype": "string", "shape": [1]}})
    result = delete_episodes(source, tmp_path / "new", "1")
    assert result.notes == ()
    (file,) = (tmp_path / "new").glob("meta/episodes/*/*.parquet")
    assert pq.read_table(file)["operator"].to_pylist() == ["ann", "cy"]
    (file,) = (tmp_path / "new").glob("data/*/*.parquet")
    assert pq.read_table(file)["note"].to_pylist() == ["x"] * 9
    assert (tmp_path / "new/meta/modality.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 20}, "fps is 10 in the first and 20 in the second"),
        ({"robot_type": "other"}, "robot_type is my_arm in the first and other in the second"),
        (
            {"names": [*NAMES[::-1]]},
            "the order of dimensions of action is shoulder, elbow, gripper in the first and gripper,",
        ),
        ({"names": NAMES[:2]}, r"the shape of observation.state is \[3\] in the first and \[2\] in the second"),
        ({"video": False}, "the dtype of observation.images.front is video in the first and image in the second"),
    ],
)
def test_merging_different_datasets_is_an_error(arguments, message, videos, tmp_path):
    other = numbered_set(tmp_path / "other", (2,), **arguments)
    with pytest.raises(ValueError, match=message):
        merge_datasets([videos, other], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_robot_type_can_be_set(images, tmp_path):
    other = numbered_set(tmp_path / "other", (2,), video=False, robot_type="other")
    merge_datasets([images, other], tmp_path / "new", robot_type="arm")
    assert open_metadata(tmp_path / "new").info.robot_type == "arm"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path, out: delete_episodes(path, out, ":"), "selects all 3 episodes"),
        (lambda path, out: delete_episodes(path, out, "7"), "the episodes are 0 to 2"),
        (lambda path, out: merge_datasets([], out), "no dataset to merge"),
        (lambda path, out: merge_datasets([path, path], out), "merged with itself"),
        (lambda path, out: merge_datasets([path, "nowhere"], out), "no folder nowhere"),
        (lambda path, out: split_dataset(path, out, {"a": "0:2", "b": "1:"}), "episodes 1 are in two parts"),
        (lambda path, out: split_dataset(path, out, {"a": "0.9", "b": "0.9"}), "fractions exceed the 3 episodes"),
        (lambda path, out: split_dataset(path, out, {"../a": "0:2"}), "expected the name of a folder"),
        (lambda path, out: resample_dataset(path, out, 20, commands="position"), "expected a lower rate"),
        (lambda path, out: resample_dataset(path, out, 5, commands=["position"]), "each of the 3 dimensions"),
        (lambda path, out: resample_dataset(path, out, 5, commands="torque"), "are torque.*position, velocity"),
        (lambda path, out: resample_dataset(path, out, 5, commands=UNSTATED), "commands are not stated"),
    ],
)
def test_impossible_edits_are_errors(edit, message, images, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        edit(images, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_merging_data_files_with_different_columns_is_an_error(images, tmp_path):
    other = copied(images, tmp_path / "other")
    (file,) = other.glob("data/*/*.parquet")
    narrow = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(24, np.float32)), 2)
    change_rows(file, lambda table: table.set_column(table.column_names.index("action"), "action", narrow))
    with pytest.raises(ValueError, match="has other columns than the first data file"):
        merge_datasets([images, other], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_instructions_are_an_error_and_unknown_columns_a_note(images, tmp_path):
    source = copied(images, tmp_path / "source")
    (file,) = source.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.append_column("pressure", [[0.5] * 12]))
    assert delete_episodes(source, tmp_path / "new", "1").notes[0].startswith("pressure of ")
    (source / "meta/tasks.parquet").unlink()
    with pytest.raises(ValueError, match=r"the task_index 0, for which meta/tasks\.parquet has no text"):
        delete_episodes(source, tmp_path / "other", "1")


def test_existing_folder_is_an_error(images, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        delete_episodes(images, tmp_path / "new", "1")


@pytest.mark.parametrize("function", ["write_parquet", "_copy_other_files"])
def test_full_disk_leaves_nothing(function, images, tmp_path, monkeypatch):
    def full(*_):
        raise NO_SPACE

    monkeypatch.setattr(rewrite, function, full)
    with pytest.raises(OSError, match="No space left"):
        merge_datasets([images], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_damaged_episode_can_be_deleted(videos, tmp_path):
    source = copied(videos, tmp_path / "source")
    (file,) = source.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.slice(1))  # the first frame of episode 0 is missing
    with pytest.raises(ValueError, match=r"episode 0 has 4 frames; expected 5.*torchpi data delete"):
        merge_datasets([source], tmp_path / "new")
    delete_episodes(source, tmp_path / "new", "0")
    assert numbers_of(tmp_path / "new") == [ramp(1, range(3)), ramp(2, range(4))]


def test_missing_column_is_named(images, tmp_path):
    source = copied(images, tmp_path / "source")
    (file,) = source.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.drop_columns(["task_index", FRONT]))
    with pytest.raises(ValueError, match=f"has no column {FRONT}, task_index, which"):
        delete_episodes(source, tmp_path / "new", "0")
    features = open_metadata(source).info.features
    change_info(source, features={"actions" if key == "action" else key: value for key, value in features.items()})
    with pytest.raises(KeyError, match="has no column action, which is required for resampling"):
        resample_dataset(source, tmp_path / "new", 5, commands="position")


def test_overlapping_episodes_are_an_error(videos, tmp_path):
    source = copied(videos, tmp_path / "source")
    (file,) = source.glob("meta/episodes/*/*.parquet")
    name = f"videos/{FRONT}/from_timestamp"
    place = pq.read_schema(file).get_field_index(name)
    change_rows(file, lambda table: table.set_column(place, name, pa.array([0.0, 0.2, 0.8])))
    with pytest.raises(ValueError, match="Episodes 0 and 1 overlap in"):
        merge_datasets([source], tmp_path / "new")
    delete_episodes(source, tmp_path / "new", "0:2")
    assert numbers_of(tmp_path / "new") == [ramp(2, range(4))]


def test_rotated_and_depth_videos_are_copied_unchanged(tmp_path):
    turned = write_set(tmp_path / "turned", video=turned_video(some_picture(), ((0, 1), (-1, 0))))
    upright = write_set(tmp_path / "upright", video=turned_video(some_picture(), ((1, 0), (0, 1))))
    result = merge_datasets([turned, upright], tmp_path / "both")
    assert result.videos_copied == 2
    frames = LeRobotDataset(tmp_path / "both", action_horizon=1)
    for old, new in ((turned, frames[0]), (upright, frames[3])):
        assert np.array_equal(LeRobotDataset(old, action_horizon=1)[0][FRONT], new[FRONT])
    coding = {"is_depth_map": True, "depth_unit": "mm", "video.depth_min": 0.25, "video.use_log": False}
    codes = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48)
    near, far = (
        write_set(
            tmp_path / name, video=encoded_video([codes] * 2, "gray12le"), info={**coding, "video.depth_max": top}
        )
        for name, top in (("near", 4.0), ("far", 8.0))
    )
    merge_datasets([near], tmp_path / "depth")
    before, after = (LeRobotDataset(path, action_horizon=1)[1][FRONT] for path in (near, tmp_path / "depth"))
    assert np.array_equal(before, after)
    with pytest.raises(ValueError, match="the depth coding of observation"):
        merge_datasets([near, far], tmp_path / "new")
    with pytest.raises(ValueError, match="depth video that would have to be re-encoded"):
        resample_dataset(near, tmp_path / "new", 5, commands="position")


def test_separate_image_files_are_embedded_in_the_data_file(images, tmp_path):
    source = copied(images, tmp_path / "source")
    (file,) = source.glob("data/*/*.parquet")
    table = pq.read_table(file)
    rows = table[FRONT].to_pylist()
    for i, row in enumerate(rows):
        name = f"images/{FRONT}/frame_{i:06d}.png"
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(row["bytes"])
        row |= {"bytes": None, "path": name}
    place = table.schema.get_field_index(FRONT)
    pq.write_table(table.set_column(place, FRONT, pa.array(rows, table.schema.field(FRONT).type)), file)
    (source / rows[0]["path"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"frame_000000\.png, which is not in the dataset's folder"):
        delete_episodes(source, tmp_path / "new", "1")
    delete_episodes(source, tmp_path / "new", "0")
    assert numbers_of(tmp_path / "new") == [ramp(1, range(3)), ramp(2, range(4))]


def test_command_prints_one_json_document(images, tmp_path, capsys):
    cli.main(["data", "split", str(images), "--parts", "a=0", "b=1:", "--out", str(tmp_path / "new"), "--json"])
    assert [result["episodes"] for result in json.loads(capsys.readouterr().out)] == [1, 2]
    cli.main(["data", "delete", str(images), "--select", "0", "--out", str(tmp_path / "other")])
    assert "2 episodes, 7 frames" in capsys.readouterr().out
    resample = ["data", "resample", str(images), "--fps", "5", "--command", "position"]
    cli.main([*resample, "--out", str(tmp_path / "slower"), "--json"])
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["episodes"], result["frames"]) == (3, 3 + 2 + 2)
    with pytest.raises(SystemExit):
        cli.main(["data", "resample", str(images), "--fps", "5", "--out", str(tmp_path / "third")])
    assert "Give either --command, or --embodiment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "split", str(images), "--parts", "a=0", "a=1", "--out", str(tmp_path / "third")])
    assert "The parts are a=0 a=1; expected" in capsys.readouterr().err
