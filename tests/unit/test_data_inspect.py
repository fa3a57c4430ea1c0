"""`torchpi data inspect` finds problems of a dataset; `torchpi data draft` drafts an embodiment from it."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from dataset_helpers import change_info, change_rows, copied, numbered_set
from numbered_set import FRONT, draw
from pixel_sets import encoded, some_depth, write_set

from torchpi import cli
from torchpi.data import LeRobotWriter
from torchpi.data.draft import draft_embodiment, questions_of
from torchpi.data.guesses import Guess, guess_command, guess_units, unit_of_action
from torchpi.data.inspect import Jump, inspect_dataset
from torchpi.inspect.dataset import render_dataset_page
from torchpi.robots import get_embodiment

JOINTS = ["shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"]
RNG = np.random.default_rng(0)


def smooth(length, low, high, seed=0):
    """A movement from low to high and back, slightly different for each seed."""
    phase = np.linspace(0, 2 * np.pi, length) + 0.3 * seed
    return low + (high - low) * (0.5 - 0.5 * np.cos(phase))


def arm_set(path, *, ranges=((-90, 80), (-40, 95), (0, 100)), episodes=3, length=40, change=None, **arguments):
    """Record an arm whose action is its next position; `change(e, state, action, images)` edits episode e."""
    options = {"fps": 20, "cameras": {"front": (64, 96, 3), "right_wrist": (64, 96, 3)}, "robot_type": "so101"}
    options |= {"state_names": JOINTS, "action_names": JOINTS}
    with LeRobotWriter(path, **options | arguments) as writer:
        for e in range(episodes):
            track = np.stack([smooth(length + 1, *limits, seed=e) for limits in ranges], axis=1).astype(np.float32)
            state, action = track[:-1].copy(), track[1:].copy()
            images = [draw(t) for t in range(length)]
            if change is not None:
                change(e, state, action, images)
            frames = {"observation.state": state, "action": action}
            writer.add_episode(
                {**frames, FRONT: images, "observation.images.right_wrist": images}, ["pick it", "put it"][e % 2]
            )
    return path


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    return arm_set(tmp_path_factory.mktemp("sets") / "arm")


def problems_of(path):
    return {problem.subject: problem.text for problem in inspect_dataset(path, pictures=2).problems}


def test_inspection_describes_a_dataset(arm):
    found = inspect_dataset(arm, pictures=3)
    assert (found.version, found.robot_type, found.fps, found.lengths) == ("v3.0", "so101", 20, (40, 40, 40))
    assert found.tasks == {"pick it": 2, "put it": 1}
    assert found.clock_fps == pytest.approx(20, rel=1e-4)
    assert [camera.key for camera in found.cameras] == [FRONT, "observation.images.right_wrist"]
    pictures = found.cameras[0].pictures
    assert [np.array_equal(image, draw(20)) for image in pictures.values()] == [True] * 3
    assert list(pictures) == [f"episode {e}, frame 20" for e in range(3)]
    assert [dim.unit.value for dim in found.state] == ["deg", "deg", "opening, 0 to 100"]
    assert [dim.command.value for dim in found.actions] == ["position"] * 3
    assert (found.state[0].low, found.state[0].high) == pytest.approx((-90, 80), abs=0.5)
    assert found.problems == []
    assert found.jumps == []


def test_jumps_are_found_with_episode_and_frame(tmp_path):
    def change(e, state, action, images):
        if e == 1:
            state[25, 0] = -60  # a single faulty reading

    found = inspect_dataset(arm_set(tmp_path / "set", change=change))
    assert {(jump.dimension, jump.episode, jump.frame) for jump in found.jumps} == {
        ("observation.state shoulder_pan.pos", 1, 25),
        ("observation.state shoulder_pan.pos", 1, 26),
    }
    text_of = {problem.subject: problem.text for problem in found.problems}
    assert "2 sudden changes" in text_of["observation.state shoulder_pan.pos"]


def test_wrapping_angle_is_named(tmp_path):
    def change(e, state, action, images):
        for values in (state, action):
            values[:, 0] = (np.linspace(170, 190, len(values)) + 180) % 360 - 180

    text = problems_of(arm_set(tmp_path / "set", change=change))["observation.state shoulder_pan.pos"]
    assert "full turn" in text
    assert "unwrap" in text


def test_binary_gripper_does_not_count_as_jumping(tmp_path):
    def change(e, state, action, images):
        action[:, 2] = 100 * (np.arange(len(action)) // 10 % 2)

    assert inspect_dataset(arm_set(tmp_path / "set", change=change)).jumps == []


def test_camera_at_half_the_rate_is_found(tmp_path):
    def change(e, state, action, images):
        images[1::2] = images[::2]

    assert "slower than 20 frames per second" in problems_of(arm_set(tmp_path / "set", change=change))[FRONT]


def test_idle_frames_constants_and_short_episodes_are_found(tmp_path):
    def change(e, state, action, images):
        state[:, 1], action[:, 1] = 5, 5
        state[10:], action[10:] = state[10], state[10]

    path = arm_set(tmp_path / "set", change=change)
    found = problems_of(path)
    assert "elbow_flex.pos never change" in found["observation.state"]
    assert "--skip-idle" in found["idle frames"]
    short = numbered_set(tmp_path / "short", (40, 40, 3), video=False)
    assert problems_of(short)["episodes"].startswith("2 are shorter")


def test_unreadable_episodes_do_not_hide_the_others(arm, tmp_path):
    path = copied(arm, tmp_path / "set")
    (file,) = path.glob("data/*/*.parquet")

    def damage(table):
        state = np.array(table["observation.state"].to_pylist(), np.float32)
        state[50] = np.nan
        place = table.schema.get_field_index("observation.state")
        return table.set_column(place, "observation.state", pa.array(state.tolist(), table.schema.field(place).type))

    change_rows(file, damage)
    found = inspect_dataset(path)
    (problem,) = found.problems
    assert problem.subject == "episode 1"
    assert "NaN or infinite in frame 10" in problem.text
    assert found.dataset.episode_indices == (0, 2)
    assert len(found.cameras[0].pictures) == 2


def test_unreadable_dataset_has_a_reason(tmp_path):
    path = numbered_set(tmp_path / "set", video=False)
    (file,) = path.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.drop_columns(["action"]))
    (path / "meta/tasks.parquet").unlink()
    found = inspect_dataset(path)
    assert [problem.subject for problem in found.problems] == ["tasks", "columns"]
    assert [camera.pictures for camera in found.cameras] == [{}]
    assert "has no column action" in render_dataset_page(found)
    with pytest.raises(ValueError, match=r"No episode of .* can be read: "):
        draft_embodiment(found, "arm")


def test_missing_and_repeated_names_are_found(tmp_path):
    path = numbered_set(tmp_path / "set", (20,), video=False)
    features = json.loads((path / "meta/info.json").read_text())["features"]
    features["observation.state"]["names"], features["action"]["names"] = None, ["a", "a", "b"]
    change_info(path, features=features)
    found = problems_of(path)
    assert "have no names" in found["observation.state"]
    assert "a each name several dimensions" in found["action"]
    (file,) = path.glob("data/*/*.parquet")
    change_rows(file, lambda table: table.drop_columns(["observation.state"]))
    del features["observation.state"]
    change_info(path, features=features)
    assert "The dataset has none" in problems_of(path)["observation.state"]


def test_wrong_clock_is_a_problem_not_an_error(arm, tmp_path):
    path = copied(arm, tmp_path / "set")
    change_info(path, fps=30)
    found = inspect_dataset(path)
    assert [problem.subject for problem in found.problems] == ["clock"]
    assert found.clock_fps == pytest.approx(20, rel=1e-4)
    assert len(found.cameras) == 2


def test_missing_video_is_reported_for_its_camera(tmp_path):
    path = numbered_set(tmp_path / "set", (20, 20))
    next(path.glob("videos/*/*/*.mp4")).unlink()
    found = inspect_dataset(path)
    assert found.problems[0].subject == FRONT
    assert found.cameras[0].pictures == {}
    assert len(found.state) == 3


@pytest.mark.parametrize(
    ("names", "low", "high", "units"),
    [
        (["a", "b"], [-3, -1], [3, 1], ["rad", "rad"]),
        (["a", "b"], [-1, -1], [1, 1], ["rad?", "rad?"]),
        (["a", "b"], [-100, -2], [100, 2], ["deg?", "deg?"]),
        (["a", "b"], [-150, -2], [150, 2], ["deg", "deg"]),
        (["a", "gripper"], [-150, 0], [150, 98], ["deg", "opening, 0 to 100"]),
        (
            ["a", "gripper"],
            [-150, 0],
            [150, 101.4],
            ["deg", "opening, 0 to 100"],
        ),  # the motor exceeds its range slightly
        (["a", "gripper"], [-2, 0], [2, 1], ["rad", "opening, 0 to 1?"]),
        (["a", "finger"], [-2, 0], [2, 0.04], ["rad", "m?"]),
        (["x", "ee_y", "qw"], [0, 0, -1], [0.5, 0.6, 1], ["m", "m", "quaternion"]),
        (["joint_vel"], [-1.5], [1.5], ["rad/s?"]),
        (["a"], [0], [4095], ["?"]),
    ],
)
def test_units_are_guessed_from_names_and_ranges(names, low, high, units):
    guesses = guess_units(names, np.array(low, np.float64), np.array(high, np.float64))
    assert [guess.value + "?" * (not guess.certain) for guess in guesses] == units
    assert all(guess.reason for guess in guesses)


def test_position_unit_of_an_action_whose_command_is_unknown_is_not_assumed():
    metres = guess_units(["z"], np.array([-1.0]), np.array([1.0]))[0]
    assert unit_of_action(metres, Guess("position", "it is near the next state", certain=True)).certain
    unknown = unit_of_action(metres, Guess("", "neither the state nor its change follows it"))
    assert str(unknown) == "unknown: from -1 to 1: a position in m?"
    assert not unknown.certain
    joint = unit_of_action(Guess("rad", "joints within 2π", certain=True), Guess("", "it does not move"))
    assert (joint.value, joint.certain) == ("rad", False)


@pytest.mark.parametrize(
    ("command", "of"),
    [
        ("position", lambda track: track[1:] + 0.01),
        ("increment", lambda track: np.diff(track)),
        ("velocity", lambda track: np.diff(track) * 20),
        ("", lambda track: np.diff(track) * 130),
        ("", lambda track: RNG.normal(size=len(track) - 1)),
        ("", lambda track: np.zeros(len(track) - 1)),
    ],
)
def test_commands_are_guessed_from_the_next_state(command, of):
    track = smooth(200, -1, 1) + smooth(200, 0, 0.3, seed=2) ** 2
    guess = guess_command(of(track), track[:-1], np.arange(198), 20)
    assert guess.value == command
    assert guess.reason


def test_page_has_pictures_and_all_sections(arm):
    found = inspect_dataset(arm)
    page = render_dataset_page(dataclasses.replace(found, jumps=[Jump("action lift", 1, 25, 0.5, 9.0)]))
    assert '<td class="name">action lift</td>' in page
    assert page.count("data:image/png;base64,") == 2 * 3  # three episodes
    assert all(text in page for text in (*JOINTS, "pick it", "so101", "No problems were found"))
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_commands_print_text_or_one_json_document(arm, tmp_path, capsys):
    cli.main(["data", "inspect", str(arm), "--html", str(tmp_path / "page.html"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["episodes"], document["frames"], document["problems"]) == (3, 120, [])
    assert document["state"][2]["unit"]["value"] == "opening, 0 to 100"
    cli.main(["data", "inspect", str(arm)])
    assert "No problems were found" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", str(tmp_path)])
    assert "is not a LeRobot dataset" in capsys.readouterr().err


def test_unedited_draft_is_a_valid_embodiment(arm, tmp_path, capsys):
    file = tmp_path / "my_arm.json"
    cli.main(["data", "draft", str(arm), "--out", str(file)])
    assert "question: " in capsys.readouterr().out
    robot = get_embodiment(file)
    assert (robot.name, robot.control_hz, robot.execute_steps) == ("my_arm", 20, 10)
    assert {camera.name: camera.key for camera in robot.cameras} == {
        "base_0_rgb": "front",
        "right_wrist_0_rgb": "right_wrist",
    }
    assert [action.kind for action in robot.actions] == ["delta", "delta", "absolute"]
    assert {action.command for action in robot.actions} == {"position"}
    assert robot.state_names == tuple(JOINTS)
    assert robot.state_units[0] == "deg"
    cli.main(["stats", str(arm), "--embodiment", str(file), "--json"])
    assert json.loads(capsys.readouterr().out)["embodiment"] == "my_arm"
    with pytest.raises(SystemExit):
        cli.main(["data", "draft", str(arm), "--out", str(file)])
    assert "exists already" in capsys.readouterr().err


def test_draft_asks_about_what_the_data_do_not_state(tmp_path):
    def change(e, state, action, images):
        action[:] = [40, 50, 60] * np.diff(np.concatenate([state, state[-1:]]), axis=0)

    found = inspect_dataset(arm_set(tmp_path / "set", change=change, action_names=["a", "b", "c"]))
    document = draft_embodiment(found, "arm")
    assert (document["execute_steps"], draft_embodiment(found, "arm", horizon=10)["execute_steps"]) == (10, 5)
    assert [action["command"] for action in document["actions"]] == [None] * 3
    assert [action["kind"] for action in document["actions"]] == ["absolute"] * 3
    (question,) = (question for question in questions_of(document) if "command unknown" in question)
    assert question.startswith("actions a, b, c: command unknown: ")
    assert re.search(r"correlation (0\.\d+ to )?[01]\.\d+\), which is 0\.01\d+ to 0\.02\d* times the action", question)
    assert "…" not in question


def test_merged_questions_have_the_ranges_of_their_numbers():
    reasons = [
        "near (correlation 0.95); unit m: from -1 to 1e-05: a",
        "near (correlation 0.91); unit m: from -2 to 0.5: a",
    ]
    rows = [
        {"name": name, "comment": f"QUESTION: {reason}"}
        for name, reason in zip("xyz", [*reasons, "other"], strict=True)
    ]
    assert list(questions_of({"cameras": [], "state": [], "actions": rows})) == [
        "actions x, y: near (correlation 0.91 to 0.95); unit m: from -2 to 0.5: a",
        "actions z: other",
    ]


def test_draft_merges_equal_questions(tmp_path):
    names = [f"joint_{i}" for i in range(6)]
    options = {"ranges": ((-0.5, 0.6),) * 6, "state_names": names, "action_names": names}
    document = draft_embodiment(inspect_dataset(arm_set(tmp_path / "set", **options)), "arm")
    joints, reason = ", ".join(names), "rad: from -0.5 to 0.6: joints, or normalized to -1 to 1"
    assert list(questions_of(document)) == [
        f"state: are these units right? {joints} {reason}",
        f"actions {joints}: unit {reason}",
    ]
    assert len([row for row in document["actions"] if "comment" in row]) == 6


def test_action_in_another_unit_than_its_state_is_found(tmp_path):
    def change(e, state, action, images):
        action[:, :2] = np.radians(action[:, :2])

    found = inspect_dataset(arm_set(tmp_path / "set", change=change))
    (problem,) = found.problems
    assert problem.subject == "action"
    assert problem.text.startswith("shoulder_pan.pos, elbow_flex.pos follow the state at a scale of 20 or more")


@pytest.mark.parametrize(("step", "repeated"), [(1, 0), (0, 1)])
def test_depth_image_that_differs_by_a_millimetre_is_not_repeated(tmp_path, step, repeated):
    depth = some_depth()
    path = write_set(
        tmp_path / "set",
        images=[encoded(depth), encoded(depth + np.uint16(step))],
        info={"is_depth_map": True, "depth_unit": "mm"},
    )
    (camera,) = inspect_dataset(path).cameras
    assert camera.repeated == (repeated, 1)


def test_depth_camera_is_shown_and_drafted_as_one(tmp_path):
    path = write_set(
        tmp_path / "set", images=[encoded(some_depth())] * 2, info={"is_depth_map": True, "depth_unit": "mm"}
    )
    found = inspect_dataset(path)
    (camera,) = found.cameras
    assert camera.kind == "image, depth"
    assert camera.depths == pytest.approx((0.23, 1.7), abs=0.05)
    assert "data:image/png" in render_dataset_page(found)
    with pytest.raises(ValueError, match="no camera that a policy could read"):
        draft_embodiment(found, "arm")


def test_draft_asks_about_surplus_cameras(arm):
    found = inspect_dataset(arm, pictures=1)
    front = found.cameras[0]
    views = [dataclasses.replace(front, key=f"observation.images.{name}") for name in ("left", "top", "side", "back")]
    depth = dataclasses.replace(front, key="observation.images.depth", kind="video, depth", depths=(0.3, 1.2))
    document = draft_embodiment(dataclasses.replace(found, cameras=[*views, depth]), "arm")
    assert [row["name"] for row in document["cameras"]].count(None) == 2
    questions = " ".join(questions_of(document))
    assert "the model has three cameras; should it read this one?" in questions
    assert '"depth": {"near": 0.3, "far": 1.2}' in questions


def test_draft_needs_a_camera(tmp_path):
    path = numbered_set(tmp_path / "set", video=False)
    info = json.loads((path / "meta/info.json").read_text())
    del info["features"][FRONT]
    change_info(path, features=info["features"])
    with pytest.raises(ValueError, match="no camera"):
        draft_embodiment(inspect_dataset(path), "arm")
