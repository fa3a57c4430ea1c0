"""Selection of episodes by number or task, and of held-out episodes."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchpi.data import LeRobotDataset, LeRobotWriter, select_episodes
from torchpi.data.episodes import hold_out

TASKS = ["open the drawer", "open the door", "Close the drawer", "open the drawer", "pour; then wait, please"]


@pytest.fixture(scope="module")
def some_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    with LeRobotWriter(path, fps=10, cameras={}, state_names=["x"], action_names=["x"]) as writer:
        for task in TASKS:
            writer.add_episode({"observation.state": [[0.0]], "action": [[1.0]]}, task)
    return path


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("2", [2]),
        ("0:2, 4", [0, 1, 4]),
        ("3:", [3, 4]),
        (":2", [0, 1]),
        (":", [0, 1, 2, 3, 4]),
        ("0:2,1:3", [0, 1, 2]),
        ("task:open the *", [0, 1, 3]),
        ("task: close *", [2]),
        ("task:*the door|*wait, please", [1, 4]),
        ("1:; task:open the drawer", [3]),
        ("task:open*;task:*drawer", [0, 3]),
    ],
)
def test_expression_selects_episodes(expression, expected, some_set):
    assert select_episodes(some_set, expression) == expected
    assert LeRobotDataset(
        some_set, action_horizon=1, episodes=select_episodes(str(some_set), expression)
    ).episode_indices == tuple(expected)


@pytest.mark.parametrize("name", ["lerobot_v3_video", "lerobot_v21"])
def test_every_format_has_tasks(name, golden_root):
    assert 0 in select_episodes(golden_root / "datasets" / name, "task:reach a *")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("5", "Not all episodes of '5' exist; the episodes are 0 to 4"),
        ("0:6", "Not all episodes of '0:6' exist"),
        ("2:2", "Not all episodes of '2:2'"),
        ("-1", "'-1' does not select episodes; expected a number, a range such as 0:40"),
        ("", "'' does not select episodes"),
        ("0;", "'' does not select episodes"),
        ("open the door", "'open the door' does not select episodes; expected a number, a range such as 0:40"),
        (
            "task:fold *",
            r"No task matches 'fold \*'; the tasks are 'open the drawer' \(2 episodes\), 'open the door' \(1 ep",
        ),
        ("2; task:open*", r"No episode of .* meets all conditions of '2; task:open\*'"),
    ],
)
def test_expressions_without_a_match_are_errors(expression, message, some_set):
    with pytest.raises(ValueError, match=message):
        select_episodes(some_set, expression)


def test_ranges_skip_missing_numbers(some_set, tmp_path):
    """Removing an episode by hand keeps the numbers of the others."""
    root = tmp_path / "old"
    shutil.copytree(some_set.parents[0] / some_set.name, root)
    import pyarrow.parquet as pq

    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter([True, False, True, True, True]), path)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 4, "total_frames": 4}))
    assert select_episodes(root, "0:3") == [0, 2]
    with pytest.raises(ValueError, match="Not all episodes of '1' exist"):
        select_episodes(root, "1")


# Held-out episodes


def held(tasks, share, seed=0):
    return hold_out(tasks, share, np.random.default_rng(seed))


def test_every_task_contributes_its_share():
    tasks = ["open"] * 100 + ["close"] * 50 + ["pour"] * 10 + ["wave"]
    assert Counter(tasks[i] for i in held(tasks, 0.1)) == {"open": 10, "close": 5, "pour": 1}
    few = ["a"] * 8 + ["b"] * 8  # one episode for two tasks: chance decides
    assert {few[i] for seed in range(20) for i in held(few, 0.02, seed)} == {"a", "b"}


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.floats(0.001, 0.999), st.integers(0, 3))
def test_every_task_keeps_a_training_episode(tasks, share, seed):
    chosen = held(tasks, share, seed)
    assert chosen == sorted(set(chosen)) == held(tasks, share, seed)
    assert 1 <= len(chosen) <= max(1, round(share * len(tasks)))
    kept = [task for i, task in enumerate(tasks) if i not in chosen]
    if len(set(tasks)) < len(tasks):
        assert set(kept) == set(tasks)
    assert kept


def test_tasks_that_are_all_different_are_ignored():
    assert len(held([f"task {i}" for i in range(100)], 0.1)) == 10
    with pytest.raises(ValueError, match="at least two episodes"):
        held(["a"], 0.1)
