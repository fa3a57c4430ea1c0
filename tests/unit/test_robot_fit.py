"""Comparison of a dataset with other robots' statistics and with its robot's units."""

import itertools
import json
import re

import numpy as np
import pytest

from torchpi.assets import assets
from torchpi.cli import main
from torchpi.data import LeRobotDataset, compute_norm_stats
from torchpi.data.fit import (
    mirrored_grippers,
    misfits,
    released_fits,
    require_normalizable_actions,
    stats_problems,
    unit_problems,
)
from torchpi.data.writer import LeRobotWriter
from torchpi.robots import Embodiment, get_embodiment
from torchpi.transforms import Normalization, NormStats, save_norm_stats
from torchpi.transforms.pipeline import Transforms
from torchpi.transforms.prompt import load_tokenizer

NAMES = ("pan", "lift", "elbow", "gripper")
UR5E = get_embodiment("ur5e").action_names
LOW, HIGH = np.array([-1.0, 0.2, 1.0, 0.0]), np.array([0.4, 2.0, 3.0, 1.0])


def stats(low, high, mean=None) -> NormStats:
    low, high = np.array(low, float), np.array(high, float)
    mean = (low + high) / 2 if mean is None else np.array(mean, float)
    return NormStats(mean, (high - low) / 4 + 1e-3, low, high)


THEIRS = stats(LOW, HIGH, [-0.3, 1.1, 2.0, 0.1])


IN_DEGREES = np.where([1, 1, 1, 0], np.degrees([LOW, HIGH]), [LOW, HIGH])


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (THEIRS, []),
        (
            stats(*IN_DEGREES, THEIRS.mean),
            ["state pan, lift, elbow: looks like degrees, but the statistics are in radians"],
        ),
        (stats(LOW, [0.4, 2, 3, 100]), ["state gripper: looks like 0 to 100, but the statistics are 0 to 1"]),
        (
            stats([-1, -2, -3, 0], [0.4, -0.2, -1, 1], THEIRS.mean),
            ["state lift, elbow: seems to turn the other way: inside with the opposite sign"],
        ),
        (
            stats(np.roll(LOW, -1), np.roll(HIGH, -1)),
            ["state: seems to have another order of dimensions; it fits with the last one first"],
        ),
    ],
)
def test_likely_causes_of_misfits(ours, expected):
    assert misfits("state", NAMES, ours, THEIRS) == expected


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (0.1, []),
        (0.5, []),
        (0.9, ["gripper: the mean is 0.9, in the statistics 0.1, within 0 to 1: inverted, or other tasks?"]),
    ],
)
def test_gripper_with_mirrored_mean_is_reported(tmp_path, capsys, mean, expected):
    """By every comparison with statistics, as a question and without a claim that values are outside."""
    assert mirrored_grippers("state", NAMES, stats(LOW, HIGH, [-0.3, 1.1, 2.0, mean]), THEIRS) == [
        f"state {text}" for text in expected
    ]
    fine = np.clip(UNIFORM, -1, 1)
    fine[:, 6] = np.arange(len(fine)) < mean * len(fine)
    theirs = stats(*np.quantile(fine, [0.01, 0.99], 0), np.where(np.arange(7) == 6, 0.1, fine.mean(0)))
    root, file = record(tmp_path / "set", "ur5e", fine), tmp_path / "norm_stats.json"
    transforms = normalizing("quantile", state=theirs, actions=theirs)
    found = stats_problems(LeRobotDataset(root, action_horizon=2), ABSOLUTE, transforms)
    expected = [f"{key} {text}" for key in ("state", "actions") for text in expected]
    assert [re.sub(r"^.*?normalize it: ", "", text) for text in found] == expected
    save_norm_stats(file, {"state": theirs, "actions": theirs})
    arguments = ("--embodiment", "ur5e", "--action-horizon", "2", "--compare", file, "--json")
    (entry,) = json.loads(shown(capsys, root, *arguments).out)["compare"]
    assert [text for text in entry["reasons"] if "inverted" in text] == expected


def test_gripper_of_a_task_without_grasping_is_not_called_inverted():
    at_rest = stats(np.append(LOW[:3], 0.99), HIGH, [-0.3, 1.1, 2.0, 0.995])
    assert mirrored_grippers("state", NAMES, at_rest, THEIRS) == []


def test_radians_are_distinguished_from_small_movements_in_degrees():
    theirs, ours = stats(*IN_DEGREES), stats(LOW, HIGH)
    expected = ["state pan, lift, elbow: looks like radians, but the statistics are in degrees"]
    assert misfits("state", NAMES, ours, theirs) == expected
    one_rests = stats(np.where([1, 0, 0, 0], 0, IN_DEGREES[0]), np.where([1, 0, 0, 0], 0, IN_DEGREES[1]))
    assert misfits("state", NAMES, one_rests, theirs) == []


def test_swapped_arms_are_recognized():
    theirs = stats([*LOW, *(LOW + 3)], [*HIGH, *(HIGH + 3)])
    ours = stats([*(LOW + 3), *LOW], [*(HIGH + 3), *HIGH])
    names = [f"{side}_{i}" for side in "lr" for i in range(4)]
    assert misfits("state", names, ours, theirs) == [
        "state: seems to have another order of dimensions; it fits with the arms swapped"
    ]


@pytest.mark.parametrize(
    ("robot", "first", "num_different", "reason"),
    [
        ("aloha", "trossen", 0, None),
        ("ur5e", "ur5e", 0, None),
        ("arx5", "arx", 0, None),
        ("franka", "franka", 0, None),
        ("droid", "droid", 0, None),
        ("libero", "physical-intelligence/libero", 0, None),
        (
            "so101",
            "ur5e",
            14,
            'shoulder_pan.pos, shoulder_lift.pos, elbow_flex.pos and 2 more: "deg", released with "rad"',
        ),
        ("xarm6", "ur5e", 2, "30 Hz, released with 20"),
        ("yam", "trossen", 4, '"0 closed, 1 open", released with "opening, 0 to 1"'),
        ("droid_joint_position", "franka", 0, "15 Hz, released with 20"),
    ],
)
def test_released_statistics_are_ranked_by_description(robot, first, num_different, reason):
    best = released_fits(get_embodiment(robot))[0]
    assert (best.name, best.num_different) == (first, num_different)
    assert "pi05_base" in best.checkpoints or first == "physical-intelligence/libero"
    assert (reason is None) == (not best.reasons)
    assert reason is None or any(reason in text for text in best.reasons)


def record(root, robot: str, values: np.ndarray, *cameras: str):
    names = list(get_embodiment(robot).action_names)
    shapes = dict.fromkeys(cameras, (4, 4, 3))
    with LeRobotWriter(root, fps=20, cameras=shapes, state_names=names, action_names=names) as writer:
        images = {f"observation.images.{camera}": np.zeros((len(values), 4, 4, 3), np.uint8) for camera in cameras}
        writer.add_episode({"observation.state": values, "action": values, **images}, "go")
    return root


@pytest.fixture
def ur5e(tmp_path):
    """A dataset of a UR5e in degrees, and statistics of one in radians."""
    rng = np.random.default_rng(0)
    radians = rng.uniform([-1.5, -2.4, 1, -2, -2, -1, 0], [1.5, -0.4, 2.4, -0.4, -1, 1, 1], (200, 7)).astype(np.float32)
    scale = np.array([180 / np.pi] * 6 + [1], np.float32)
    save_norm_stats(tmp_path / "stats.json", {
        what: stats(np.quantile(radians, 0.01, 0), np.quantile(radians, 0.99, 0)) for what in ("state", "actions")
    })  # fmt: skip
    return record(tmp_path / "degrees", "ur5e", radians * scale), record(tmp_path / "radians", "ur5e", radians)


def shown(capsys, *arguments):
    main(["stats", *map(str, arguments)])
    return capsys.readouterr()


def test_actions_in_another_unit_than_the_robot_are_found(ur5e, capsys):
    degrees, radians = ur5e
    (problem,) = unit_problems(LeRobotDataset(degrees, action_horizon=1), get_embodiment("ur5e"))
    assert "shoulder_pan_joint goes from -84.84 to 85.43, 'ur5e' takes -6.2832 to 6.2832 (rad); " in problem
    assert "and 3 more; the values look like degrees. Choose an embodiment in the dataset's unit" in problem
    assert unit_problems(LeRobotDataset(radians, action_horizon=1), get_embodiment("ur5e")) == []
    arguments = ("--embodiment", "ur5e", "--action-horizon", "2")
    assert shown(capsys, degrees, *arguments).err.count("look like degrees. Choose an embodiment") == 1
    assert "degrees" not in shown(capsys, radians, *arguments).err


def test_training_refuses_actions_in_another_unit(tmp_path, capsys):
    root = record(tmp_path / "set", "ur5e", np.full((8, 7), 90, np.float32), "base_rgb")
    with pytest.raises(SystemExit):
        main(["train", "--model=tiny", f"--dataset={root}", "--embodiment=ur5e", f"--out={tmp_path}/run"])
    assert "shoulder_pan_joint goes from 90 to 90, 'ur5e' takes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_delta_action_in_another_unit_than_its_state_is_found(tmp_path):
    robot = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=NAMES, actions=NAMES, delta=NAMES[:3])
    angles = np.sin(np.arange(40)[:, None] / 8 + np.arange(4))
    with LeRobotWriter(tmp_path / "set", fps=10, cameras={}, state_names=NAMES, action_names=NAMES) as writer:
        for now, then in itertools.pairwise(angles):
            action = then * [1, 0.5, 180 / np.pi, 100]  # a weak motor, degrees, and an absolute gripper of 0 to 100
            writer.add_frame({"observation.state": np.float32(now), "action": np.float32(action)})
        writer.save_episode("go")
    (problem,) = unit_problems(LeRobotDataset(tmp_path / "set", action_horizon=1), robot)
    assert problem.count("goes from") == 1
    assert "elbow goes from" in problem
    assert "seem to have different units" in problem


ABSOLUTE = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=UR5E, actions=UR5E)
UNIFORM = np.random.default_rng(0).uniform(-1, 1, (400, 7)).astype(np.float32) + np.linspace(0, 2, 7, dtype=np.float32)
ENDS = np.quantile(UNIFORM, [0.01, 0.99], axis=0)
ELBOW = np.arange(7) == 2


def normalizing(kind: str, **given: NormStats) -> Transforms:
    return Transforms(
        given, dict.fromkeys(given, Normalization(kind)), load_tokenizer(assets() / "tiny_tokenizer.model"),
        discrete_state_input=True, max_token_len=None, action_dim=7,
    )  # fmt: skip


def problems(tmp_path, given: NormStats, kind: str) -> list[str]:
    """Problems of a dataset with a policy that has these statistics of state and actions."""
    transforms = normalizing(kind, state=given, actions=given)
    dataset = LeRobotDataset(record(tmp_path / f"set_{kind}", "ur5e", UNIFORM), action_horizon=2)
    return stats_problems(dataset, ABSOLUTE, transforms)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (ENDS, None),
        (ENDS + 0.1, None),  # a slightly different workspace
        (ENDS * 1000, "fill less than 2% of most ranges"),  # millimetres
        (ENDS + 1.2, r"6\d\.\d% of the (state|actions) are outside q01\.\.q99, where 2% are expected"),
        (ENDS + 1.6 * ELBOW, r"most of elbow_joint [78]\d% \(-0\.\d+ to 1\.\d+, statistics 1\.\d+ to 3\.\d+\)"),
    ],
)
def test_misfit_is_reported_once_for_state_and_once_for_actions(tmp_path, ends, expected):
    found = problems(tmp_path, stats(*ends), "quantile")
    assert len(found) == (0 if expected is None else 2)
    assert all(re.search(expected or "", problem) for problem in found)


@pytest.mark.parametrize("ends", [ENDS / 1000, np.array([[99.0] * 7, [99.1] * 7])])
def test_completely_wrong_statistics_are_an_error(tmp_path, ends):
    with pytest.raises(ValueError, match=r"of the state .* of the actions .* Nothing can be trained or evaluated"):
        problems(tmp_path, stats(*ends), "quantile")


def test_z_score_statistics_are_compared_by_std(tmp_path):
    """A gripper that hardly ever moves has equal quantiles, but z-scores divide by std only."""
    resting = NormStats(UNIFORM.mean(0), UNIFORM.std(0), UNIFORM[0], UNIFORM[0])
    assert problems(tmp_path, resting, "z_score") == []
    assert problems(tmp_path, resting, "identity") == []
    with pytest.raises(ValueError, match="root mean square of normalized values is"):
        problems(tmp_path, resting, "quantile")


def test_compare_with_statistics_files_has_reasons(ur5e, tmp_path, capsys):
    arguments = (ur5e[0], "--embodiment", "ur5e", "--action-horizon", "2", "--compare", tmp_path / "stats.json")
    (entry,) = json.loads(shown(capsys, *arguments, "--json").out)["compare"]
    assert entry["name"] == "stats"
    dims = "state shoulder_pan_joint, shoulder_lift_joint, elbow_joint and 3 more"
    assert f"{dims}: looks like degrees, but the statistics are in radians" in entry["reasons"]
    assert "farthest outside: state elbow_joint" in entry["reasons"][-1]
    several = json.loads(shown(capsys, *arguments, "demo", "--json").out)["compare"]
    assert [entry["name"] for entry in several] == [f"{tmp_path / 'stats.json'}: stats", "demo: demo_policy"]
    reason = "state has 4 dimensions in the statistics and 7 in the dataset; only the first 4 are compared"
    assert reason in several[1]["reasons"]
    assert "farthest outside: " in shown(capsys, *arguments).out.replace("\n", " ")


def test_compare_without_a_checkpoint_ranks_the_released_ones(ur5e, capsys):
    arguments = (ur5e[1], "--embodiment", "ur5e", "--action-horizon", "2", "--compare")
    ranked = json.loads(shown(capsys, *arguments, "--json").out)["compare"]
    assert [entry["name"] for entry in ranked][:2] == ["ur5e", "franka"]
    assert (ranked[0]["checkpoints"], ranked[0]["reasons"]) == (["pi05_base", "pi0_base"], [])
    text = shown(capsys, *arguments).out
    assert "ur5e (ur5e) in pi05_base, pi0_base; 0 dimensions differ:\n    fits" in text
    assert "physical-intelligence/libero" in text


def test_action_that_is_nearly_always_the_same_cannot_be_trained_with_its_own_quantiles(tmp_path):
    """They are equal, so that quantile normalization would multiply its other values by a million."""
    sparse = np.where(np.arange(7) == 5, 0, UNIFORM)
    sparse[200, 5] = 0.5
    dataset = LeRobotDataset(record(tmp_path / "sparse", "ur5e", sparse), action_horizon=1)
    own = compute_norm_stats(dataset, ABSOLUTE, action_horizon=1)
    with pytest.raises(ValueError, match=r"wrist_3_joint is 0 to 0 in 98% of the frames.* widen q01 and q99"):
        require_normalizable_actions(dataset, ABSOLUTE, normalizing("quantile", **own))
    for kind in ("z_score", "identity"):
        require_normalizable_actions(dataset, ABSOLUTE, normalizing(kind, **own))
    usual = LeRobotDataset(record(tmp_path / "usual", "ur5e", UNIFORM), action_horizon=1)
    own = compute_norm_stats(usual, ABSOLUTE, action_horizon=1)
    require_normalizable_actions(usual, ABSOLUTE, normalizing("quantile", **own))
