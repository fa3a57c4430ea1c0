"""Datasets whose state or action is stored in several columns."""

import json
import pickle
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from droid_set import RENAME, write_droid_set

from torchpi import cli
from torchpi.data import LeRobotDataset, to_observation
from torchpi.data.metadata import open_metadata
from torchpi.data.rename import parse_rename
from torchpi.robots import get_embodiment

JOINED = parse_rename(RENAME)


@pytest.fixture(scope="module", params=["number", "list"])
def droid_set(request, tmp_path_factory):
    """The folder of a dataset, and its states."""
    path = tmp_path_factory.mktemp("droid") / "set"
    return path, write_droid_set(path, gripper=request.param)


@pytest.fixture(scope="module")
def one_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("droid") / "set"
    write_droid_set(path, episodes=1, length=4)
    return path


@pytest.fixture
def damaged(one_set, tmp_path):
    """A copy whose data file a test changes."""

    def change(**columns):
        shutil.copytree(one_set, tmp_path / "set")
        file = tmp_path / "set/data/chunk-000/file-000.parquet"
        table = pq.read_table(file)
        changed = {name: table.column(name) for name in table.column_names} | columns
        pq.write_table(pa.table({name: values for name, values in changed.items() if values is not None}), file)
        return tmp_path / "set"

    return change


def test_columns_are_joined_in_the_given_order(droid_set):
    path, states = droid_set
    dataset = LeRobotDataset(path, action_horizon=4, rename=JOINED)
    assert np.array_equal(dataset.columns["observation.state"], states)
    assert not {"joint_position", "gripper_position"} & set(dataset.columns)
    observation = to_observation(pickle.loads(pickle.dumps(dataset))[5], get_embodiment("droid"))
    assert np.array_equal(observation["observation/joint_position"], states[5, :7])
    assert np.array_equal(observation["observation/gripper_position"], states[5, 7:])
    other_way = {"gripper_position+joint_position": "observation.state", "actions": "action"}
    turned = LeRobotDataset(path, action_horizon=4, cameras=(), rename=other_way)
    assert np.array_equal(turned.columns["observation.state"], np.roll(states, 1, axis=1))


def test_dimensions_keep_their_names(one_set, tmp_path):
    dataset = LeRobotDataset(one_set, action_horizon=1, rename=JOINED)
    assert dataset.features["observation.state"]["shape"] == [8]
    assert dataset.state_names == (*(f"joint_position_{i}" for i in range(7)), "gripper_position")
    shutil.copytree(one_set, tmp_path / "set")
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    info["features"]["joint_position"]["names"] = {"motors": list("abcdefg")}
    info["features"]["gripper_position"] |= {"shape": [], "names": None}
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    named = LeRobotDataset(tmp_path / "set", action_horizon=1, rename=JOINED)
    assert named.state_names == (*"abcdefg", "gripper_position")


def test_joined_column_may_keep_the_name_of_a_part(one_set):
    rename = {"joint_position": "observation.state", "actions+gripper_position": "action"}
    whole = LeRobotDataset(one_set, action_horizon=1, cameras=(), rename=rename)
    assert whole.columns["observation.state"].shape == (4, 7)
    assert whole.columns["action"].shape == (4, 9)
    again = open_metadata(one_set, rename={"actions+gripper_position": "actions", "joint_position": "state"})
    assert again.info.features["actions"]["shape"] == [9]


def test_only_needed_columns_are_read(damaged):
    missing = pa.array([None] * 4, pa.float32())
    path = damaged(reward=missing)
    LeRobotDataset(path, action_horizon=1, columns=(), rename=JOINED)
    with pytest.raises(ValueError, match="column reward: 4 values are missing"):
        LeRobotDataset(path, action_horizon=1, columns=["reward"], rename=JOINED)
    with pytest.warns(UserWarning, match=r"the columns reward are skipped.* 4 values are missing"):
        assert "reward" not in LeRobotDataset(path, action_horizon=1, rename=JOINED).columns


def test_every_command_joins_columns(droid_set, capsys):
    path = str(droid_set[0])
    cli.main(["stats", path, "--embodiment", "droid", "--action-horizon", "4", "--json", "--rename", *RENAME])
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["state"]["mean"], droid_set[1].mean(axis=0), atol=1e-6)
    options = ["--embodiment", "droid", "--episodes", "1:", "--rename", *RENAME]
    sizes = ["--workers", "0", "--batch", "2", "--repeats", "1", "--config", "tiny"]
    cli.main(["bench", "data", path, *options, *sizes, "--json"])
    assert json.loads(capsys.readouterr().out)["cameras"] == ["exterior_image_1_left", "wrist_image_left"]


def test_error_suggests_joining_columns(one_set):
    both = re.escape(f"--rename {' '.join(RENAME)}, or")
    for given in ({}, {"joint_position+gripper_position": "observation.state"}):
        with pytest.raises(KeyError, match=both):
            LeRobotDataset(one_set, action_horizon=1, rename=given)


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        ("joint_position+gripper=observation.state", KeyError, r"no gripper to rename; its columns and"),
        ("joint_position+wrist_image_left=x", ValueError, r"wrist_image_left of .* can't be joined .* it is image of"),
        ("joint_position+joint_position=x", ValueError, "rename uses joint_position of .* twice"),
        (
            "joint_position+gripper_position=x gripper_position=y",
            ValueError,
            "uses gripper_position of .* twice",
        ),
        (
            "joint_position+gripper_position=actions",
            ValueError,
            "can't be renamed to actions: the dataset has",
        ),
        ("joint_position+=x", ValueError, r"expected OLD=NEW, .* or OLD\+OLD=NEW"),
    ],
)
def test_columns_that_cannot_be_joined_are_errors(rename, error, message, one_set):
    with pytest.raises(error, match=message):
        LeRobotDataset(one_set, action_horizon=1, rename=parse_rename(rename.split()))


def test_data_files_without_a_part_are_errors(damaged):
    table = [[[0.0, 1.0]]] * 4
    for column, error, message in (
        (None, KeyError, r"no column gripper_position, which observation.state is joined from; its numeric"),
        (pa.array(["open"] * 4), KeyError, "no column gripper_position, which"),
        (pa.array(table), ValueError, r"gripper_position has the shape \[1, 2\] per frame"),
    ):
        path = damaged(gripper_position=column)
        with pytest.raises(error, match=message):
            LeRobotDataset(path, action_horizon=1, rename=JOINED)
        shutil.rmtree(path)
