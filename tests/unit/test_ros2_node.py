"""The ROS 2 node without ROS: settings, joints, synchronisation, and runs of the control loop between topics."""

import copy
import dataclasses
import itertools
import pathlib
import re
import threading

import numpy as np
import pytest
import yaml
from ros2_helpers import (
    DirectInference,
    FakeRos,
    FakeServer,
    StepClock,
    compressed,
    image,
    joint_state,
    rgb,
    text,
)
from rosbags.typesys import Stores, get_typestore

from torchpi.robots import get_embodiment
from torchpi_client import ServerError
from torchpi_client.protocol import RTC
from torchpi_ros2.bridge import RosPolicy, Sensors
from torchpi_ros2.config import ARRAY, COMPRESSED, IMAGE, TRAJECTORY, load_config, parse_config
from torchpi_ros2.control import Control, RosClock
from torchpi_ros2.errors import UnusableError
from torchpi_ros2.joints import command_message, read_joints
from torchpi_ros2.plan import make_plan

CONFIGS = pathlib.Path(__file__).parents[2] / "integrations" / "ros2" / "config"
HZ = 10.0

SETTINGS = {
    "server": "ws://fake:8000",
    "prompt": "go",
    "cameras": {"images.front": {"topic": "/front", "type": IMAGE}},
    "joints": {
        "arm": {"joint": "arm_joint", "unit": "deg"},
        "hand": {"joint": "hand_joint", "from": [0.0, 0.05], "to": [0, 100]},
    },
    "state": {"state": {"topic": "/joint_states", "dimensions": ["arm", "hand"]}},
    "actions": [{"topic": "/arm/joint_trajectory", "type": TRAJECTORY, "dimensions": ["arm", "hand"]}],
    "limits": "none",
}
METADATA = {
    "observation": {
        "cameras": [{"key": "images.front", "layout": "hwc", "dtype": "uint8", "presence": "required"}],
        "state": [{"key": "state", "names": ["arm", "hand"]}],
    },
    "action_names": ["arm", "hand"],
    "action_commands": ["position", "position"],
    "control_hz": HZ,
    "execute_steps": 4,
    "default_prompt": None,
}


def settings(**changes):
    return parse_config(copy.deepcopy({**SETTINGS, **changes}))


def degrees(radians):
    return radians * 180 / np.pi


class Rig:
    """Node with fake topics, a scripted server and a virtual clock. Sensors publish at each step."""

    def __init__(self, answers=None, *, metadata=METADATA, before=lambda step: None, monotonic=None, **changes):
        self.ros = FakeRos()
        self.server = FakeServer(metadata, answers or (lambda observation: np.tile(observation["state"] + 1, (8, 1))))
        self.clock = StepClock(self.ros, self.on_step)
        self.before = before
        self.silent = set()
        self.front = lambda: rgb(stamp=self.ros.time)
        self.control = Control(
            settings(**changes),
            self.ros,
            connect=self.server,
            clock=self.clock,
            make_inference=lambda policy: DirectInference(policy, self.ros),
            monotonic=monotonic or self.ros.now,
        )
        self.beats = []

    def on_step(self, step):
        self.before(step)
        self.publish()
        self.control.beat()
        self.beats.append(self.ros.sent["/diagnostics"][-1].status[0])

    def publish(self):
        for topic, message in (
            ("/front", self.front()),
            ("/joint_states", joint_state({"hand_joint": 0.01, "arm_joint": 0.5}, self.ros.time)),
        ):
            if topic not in self.silent:
                self.ros.send(topic, message)

    def run(self, steps=20):
        """Publish sensor messages while the node waits for its topics."""
        done = threading.Event()

        def publish():
            while not done.wait(0.01):
                if "/front" in self.ros.callbacks and "/joint_states" in self.ros.callbacks:
                    self.publish()
                    return

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            return self.control.run(steps=steps)
        finally:
            done.set()
            thread.join()

    @property
    def positions(self):
        """Positions of the published trajectories, in ROS units."""
        return [message.points[0].positions.tolist() for message in self.ros.sent.get("/arm/joint_trajectory", [])]


# ---- settings ----


def test_example_settings_fit_their_robots():
    for file, robot in (("so101.yaml", "so101"), ("arm7.yaml", "franka")):
        embodiment = get_embodiment(robot)
        metadata = {
            "observation": embodiment.observation_format,
            "action_names": list(embodiment.action_names),
            "action_commands": [action.command for action in embodiment.actions],
            "action_limits": embodiment.action_limits,
            "control_hz": embodiment.control_hz,
            "torchpi/rtc": True,
        }
        plan = make_plan(load_config(CONFIGS / file), metadata)
        assert plan.action_names == embodiment.action_names
        assert plan.settings.dry_run
        assert sum(len(output.dimensions) for output in plan.outputs) == len(embodiment.actions)


def test_settings_of_the_documentation_are_valid():
    page = (CONFIGS.parents[2] / "docs" / "ros2.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    config = parse_config(yaml.safe_load(block))
    table = page[page.index("| key |") : page.index("**Units.**")]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(documented) == sorted([*(field.name for field in dataclasses.fields(config)), "joints"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"camera": {}}, "the file has the unknown key camera; expected joints, "),
        ({"cameras": None}, "the file has no cameras"),
        ({"cameras": {}}, "at least one in cameras"),
        ({"cameras": {"front": "/front"}}, "cameras, 'front' is '/front'; expected a table"),
        ({"cameras": {"front": {"topic": "/f", "type": "sensor_msgs/Image"}}}, "type is 'sensor_msgs/Image'; expected"),
        ({"joints": {"arm": {"joint": "a"}}}, "'arm' states joint; expected one of: unit"),
        ({"joints": {"arm": {"unit": "deg", "scale": 2.0}}}, "states unit, scale; expected one of"),
        ({"joints": {"arm": {"unit": "degrees"}}}, "unit is 'degrees'; expected one of rad, deg"),
        ({"joints": {"arm": {"scale": 0}}}, "the scale is 0"),
        ({"joints": {"arm": {"scale": True}}}, "scale is True; expected a number"),
        ({"joints": {"arm": {"scale": float("nan")}}}, "scale is nan"),
        ({"joints": {"arm": {"from": [1, 1], "to": [0, 100]}}}, "two different numbers"),
        ({"joints": {"arm": {"from": [0, 1]}}}, "two different numbers"),
        ({"joints": {"arm": {"unit": "rad", "field": "velocity", "offset": 1}}}, "only positions have an offset"),
        ({"state": {"state": {"topic": "/j", "dimensions": ["leg"]}}}, r"dimensions has \['leg'\]; expected names"),
        ({"state": {"state": [{"topic": "/j", "dimensions": ["arm"]}] * 2}}, "state dimension arm occurs more than"),
        ({"actions": []}, "at least one in actions"),
        ({"actions": [{"topic": "/a", "type": ARRAY, "dimensions": ["arm"], "time_from_start": 1}]}, "cannot carry"),
        ({"max_age": 0}, "max_age is 0; expected a positive number"),
        ({"max_age": "1e-1"}, "max_age is '1e-1'; expected a number"),
        ({"time": "sim"}, "time is 'sim'; expected one of header, arrival"),
        ({"limits": "some"}, "limits is 'some'"),
        ({"server": {"url": "ws://x", "token": "t"}}, "server has the unknown key token"),
    ],
)
def test_wrong_settings_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        settings(**changes)


def test_invalid_settings_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no settings file ''"):
        load_config("")
    file = tmp_path / "robot.yaml"
    for content, match in (
        ("a: [", "is not valid YAML"),
        ("- 1", "the file is .1.; expected a table"),
        (yaml.safe_dump(SETTINGS) + "\nprompt: again\n", "prompt occurs twice"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"robot.yaml.*{match}"):
            load_config(file)


@pytest.mark.parametrize(
    ("metadata", "changes", "match"),
    [
        (
            {"action_names": ["arm", "foot"]},
            {},
            r"actions are arm, foot; the outputs carry arm, hand: hand unknown, foot missing",
        ),
        (
            {"action_commands": ["position", "velocity"]},
            {},
            "trajectory of positions, but hand are not position commands",
        ),
        ({"action_names": ["arm", "hand", "hand"]}, {}, "actions have the name hand more than once"),
        ({"action_commands": None}, {}, "have no valid command"),
        ({"control_hz": None}, {}, "control_hz"),
        ({}, {"control": {"control_hz": 5}}, "control_hz is 5, but the policy's actions are for 10 Hz"),
        ({}, {"control": {"speed": 5}}, "control has the unknown key speed; expected action_commands"),
        ({}, {"control": {"mode": "fast"}}, "control: mode is 'fast'"),
        ({}, {"limits": "server"}, "The server states no action limits"),
        ({}, {"limits": {"leg": {"low": 0}}}, "limits has leg; the policy's actions are arm, hand"),
        ({}, {"prompt": None}, "set prompt or prompt_topic"),
        (
            {"observation": {**METADATA["observation"], "state": [{"key": "state", "names": ["arm", "wrist"]}]}},
            {},
            "the policy reads arm, wrist",
        ),
        ({"observation": {**METADATA["observation"], "state": []}}, {}, "reads the state of none"),
        (
            {"observation": {**METADATA["observation"], "cameras": []}},
            {},
            "images.front unknown, none missing",
        ),
        ({}, {"cameras": {"images.front": {"topic": "/d", "type": IMAGE, "depth_unit": "mm"}}}, "reads colours"),
        ({"action_range": {"low": [-1.5, 0], "high": [1.5, 100]}}, {}, "unit of arm is stated as deg, .* radians"),
        (
            {"action_range": {"low": [-95, 0], "high": [90, 100]}},
            {"joints": {**SETTINGS["joints"], "arm": {"joint": "arm_joint", "unit": "rad"}}},
            "stated as rad, but the policy was trained with positions of up to arm 95",
        ),
    ],
)
def test_settings_that_contradict_the_server_are_refused(metadata, changes, match):
    with pytest.raises(ValueError, match=match):
        make_plan(settings(**changes), {**METADATA, **metadata})


def test_limits_in_settings_override_the_servers():
    stated = {**METADATA, "action_limits": {"low": [-90, 0], "high": [90, 100], "max_step": [None, None]}}
    limits = make_plan(settings(limits={"arm": {"max_step": 3, "high": 45}}), stated).settings.limits
    assert limits.low.tolist() == [-90, 0]
    assert limits.high.tolist() == [45, 100]
    assert limits.max_step.tolist() == [3, np.inf]


def test_order_and_commands_for_openpi_server_come_from_settings():
    control = {"control_hz": 15, "action_commands": ["position", "position"]}
    plan = make_plan(settings(control=control), {})
    assert plan.action_names == ("arm", "hand")
    assert plan.state == {"state": ("arm", "hand")}


# ---- joints ----


def dimensions(*names, **changes):
    joints = parse_config({**SETTINGS, **changes}).state[0].dimensions
    return [joint for name in names for joint in joints if joint.name == name]


def test_joints_are_found_by_name_and_converted():
    message = joint_state({"other": 9.0, "hand_joint": 0.05, "arm_joint": -np.pi / 2})
    np.testing.assert_allclose(read_joints(message, dimensions("arm", "hand")), [-90, 100], rtol=1e-6)
    assert read_joints(joint_state({"other": 1.0}), dimensions("arm", "hand")) is None


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (joint_state({"arm_joint": 0.0}), "has the joints arm_joint, without hand_joint; .* their own entry"),
        (joint_state({"arm_joint": np.nan, "hand_joint": 0.0}), "position of arm_joint is nan"),
        (joint_state({"arm_joint": 0.0, "hand_joint": np.inf}), "position of hand_joint is inf"),
        (joint_state({"arm_joint": 0.0, "hand_joint": 0.0}, position=[0.0]), "2 joints, but 1 numbers of position"),
    ],
)
def test_unusable_joint_states_are_named(message, match):
    with pytest.raises(UnusableError, match=match):
        read_joints(message, dimensions("arm", "hand"))


def test_velocities_have_scale_and_no_offset():
    joints = {
        "arm": {"joint": "arm_joint", "unit": "deg", "field": "velocity"},
        "hand": {"joint": "hand_joint", "scale": -2.0, "offset": 1.0},
    }
    message = joint_state({"arm_joint": 9.0, "hand_joint": 3.0}, velocity=[np.pi, 0.0])
    np.testing.assert_allclose(read_joints(message, dimensions("arm", "hand", joints=joints)), [180, -5], rtol=1e-6)


@pytest.mark.parametrize("store", [Stores.ROS2_HUMBLE, Stores.ROS2_JAZZY])
def test_commands_are_valid_messages(store):
    ros = FakeRos(store=get_typestore(store))
    (output,) = settings().actions
    message = ros.transmitted(command_message(ros.types, output, [0.25, 0.04], 0.1))
    assert message.joint_names == ["arm_joint", "hand_joint"]
    assert message.header.stamp.sec == message.header.stamp.nanosec == 0
    (point,) = message.points
    assert point.positions.tolist() == [0.25, 0.04]
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 100_000_000)
    (output,) = settings(actions=[{"topic": "/a", "type": ARRAY, "dimensions": ["hand", "arm"]}]).actions
    message = ros.transmitted(command_message(ros.types, output, [0.04, 0.25], 0.1))
    assert message.data.tolist() == [0.04, 0.25]


# ---- synchronisation ----


def sensors(**changes):
    """Sensors of two cameras with different rates and of joints, on the test's clock."""
    ros = FakeRos()
    cameras = {
        "images.front": {"topic": "/front", "type": IMAGE},
        "images.wrist": {"topic": "/wrist", "type": COMPRESSED},
    }
    config = settings(**{"cameras": cameras, "slop": 0.03, "max_age": 0.5, **changes})
    observation = {
        "cameras": [
            {"key": key, "layout": "hwc", "dtype": "uint8", "presence": "required"} for key in config_keys(config)
        ],
        "state": METADATA["observation"]["state"],
    }
    plan = make_plan(config, {**METADATA, "observation": observation})
    return ros, Sensors(config, plan, ros, monotonic=lambda: ros.time - 900)


def config_keys(config):
    return [camera.key for camera in config.cameras]


def front(stamp, level=0):
    return rgb((level,) * 3, stamp)


def wrist(stamp, level=0):
    return compressed(np.full((8, 8, 3), level, np.uint8), "jpeg", stamp)


def joints(stamp, angle=0.0):
    return joint_state({"arm_joint": angle, "hand_joint": 0.0}, stamp)


def test_messages_of_the_same_time_form_one_observation():
    """Front camera at 5 Hz, wrist camera at 25 Hz, joints at 100 Hz; each message contains its time."""
    ros, node = sensors()
    for tick in range(101):
        ros.time = 1000 + tick / 100
        ros.send("/joint_states", joints(ros.time, np.deg2rad(tick)))
        if tick % 4 == 1:
            ros.send("/wrist", wrist(ros.time, tick))
        if tick % 20 == 6:
            ros.send("/front", front(ros.time, tick))
    observation = node.decode(node.snapshot())
    assert observation["images"]["front"][0, 0, 0] == 86
    assert abs(int(observation["images"]["wrist"][0, 0, 0]) - 86) <= 2
    assert observation["state"][0] == pytest.approx(86)
    assert observation["prompt"] == "go"
    assert node.problem is None


def test_joints_from_several_publishers_of_one_topic():
    parts = [{"topic": "/joint_states", "dimensions": ["hand"]}, {"topic": "/joint_states", "dimensions": ["arm"]}]
    ros, node = sensors(state={"state": parts})
    ros.send("/front", front(1000))
    ros.send("/wrist", wrist(1000))
    ros.send("/joint_states", joint_state({"arm_joint": np.pi}))
    assert "no usable message of state (/joint_states) received: its messages have other joints" in node.problem
    ros.send("/joint_states", joint_state({"hand_joint": 0.05}))
    ros.send("/joint_states", joint_state({"wheel": 0.05}))
    np.testing.assert_allclose(node.decode(node.snapshot())["state"], [180, 100], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("nothing", r"no usable message of images.front \(/front\) received"),
        ("silent", r"last usable message of images.wrist \(/wrist\) is 0.6 s old, more than 0.5 s"),
        ("zero stamps", r"of images.wrist .* received: its stamp is 0, .* use time: arrival"),
        ("another clock", r"of images.wrist .* arrived 0 s ago and is 988 s old by its stamp, .* use_sim_time"),
        ("future", r"of images.wrist .* is -50 s old by its stamp"),
        ("apart", r"nearest messages of images.wrist .* and images.front .* are 0.1 s apart, more than the slop"),
        ("nan", r"of state .* received: the position of arm_joint is nan"),
        ("joints", r"of state .* received: .* without hand_joint"),
        ("encoding", r"of images.front .* received: the encoding is '16UC1'"),
        ("format", r"of images.wrist .* received: the format is 'h264'"),
    ],
)
def test_reason_for_no_observation_is_named(case, match):
    ros, node = sensors()
    messages = {"/front": front(1000), "/wrist": wrist(1000), "/joint_states": joints(1000)}
    if case == "nothing":
        messages = {}
    elif case == "zero stamps":
        messages["/wrist"] = wrist(0)
    elif case == "another clock":
        messages["/wrist"] = wrist(12)
    elif case == "future":
        messages["/wrist"] = wrist(1050)
    elif case == "apart":
        messages["/wrist"] = wrist(999.9)
    elif case == "nan":
        messages["/joint_states"] = joints(1000, np.nan)
    elif case == "joints":
        messages["/joint_states"] = joint_state({"arm_joint": 0.0})
    elif case == "encoding":
        messages["/front"] = image(bytes(4), "16UC1", width=2, height=1)
    elif case == "format":
        messages["/wrist"].format = "h264"
    for topic, message in messages.items():
        ros.send(topic, message)
    if case == "silent":
        ros.time = 1000.6
        ros.send("/front", front(1000.6))
    assert re.search(match, node.problem), node.problem
    with pytest.raises(TimeoutError, match=match):
        RosPolicy(FakeServer(METADATA, None), node).infer(node.snapshot())


def test_stamps_of_another_clock_are_replaced_by_arrival_times():
    ros, node = sensors(time="arrival")
    for topic, message in (("/front", front(0)), ("/wrist", wrist(12)), ("/joint_states", joints(1e9))):
        ros.send(topic, message)
    assert node.problem is None
    ros.time += 0.1
    ros.send("/front", front(0))
    ros.send("/joint_states", joints(0))
    assert node.problem is None  # the wrist camera is the slowest and sets the time


def test_restarted_simulation_is_followed():
    ros, node = sensors()
    for time in (1000, 500):
        ros.time = time
        for topic, message in (("/front", front(time)), ("/wrist", wrist(time)), ("/joint_states", joints(time))):
            ros.send(topic, message)
    assert node.decode(node.snapshot())["state"].tolist() == [0, 0]
    clock = RosClock(ros, threading.Event())
    assert clock.now() == 500
    ros.time = 10
    with pytest.raises(RuntimeError, match=r"went back from 500.000 to 10.000 s"):
        clock.now()


def test_overtaken_message_is_dropped():
    ros, node = sensors()
    for stamp in (1000.0, 999.98):
        ros.send("/joint_states", joints(stamp, stamp - 1000))
    ros.send("/front", front(1000))
    ros.send("/wrist", wrist(1000))
    assert node.decode(node.snapshot())["state"][0] == 0


# ---- runs ----


def test_observations_lead_to_commands_in_the_units_of_each_side():
    rig = Rig()
    report = rig.run()
    request = rig.server.requests[1]
    assert request["prompt"] == "go"
    assert request["images"]["front"].tolist() == np.full((2, 4, 3), (10, 20, 30)).tolist()
    np.testing.assert_allclose(request["state"], [degrees(0.5), 20], rtol=1e-6)
    assert report.actions > 10
    np.testing.assert_allclose(rig.positions[-1], [0.5 + np.pi / 180, 0.0105], rtol=1e-6)
    assert {beat.level for beat in rig.beats[5:]} == {0}
    assert rig.beats[-1].message == "controlling"
    assert {pair.key for pair in rig.beats[-1].values} >= {"steps", "age_ms images.front (/front)"}
    assert rig.server.arguments["url"] == "ws://fake:8000"


def test_robot_is_held_without_a_camera_and_resumes_when_it_returns():
    def before(step):
        if step == 12:
            rig.silent.add("/front")
        if step == 40:
            rig.silent.clear()

    count = iter(range(1000))
    rig = Rig(lambda observation: np.full((8, 2), 10 + next(count)), before=before)
    report = rig.run(steps=60)
    positions = [round(degrees(position[0])) for position in rig.positions]
    held = positions[25:38]
    assert len(set(held)) == 1  # the last command is repeated
    assert positions[-1] > held[-1]
    assert report.failed_requests > 10
    assert rig.beats[35].level == 1
    assert re.search(r"held for \d.\d s: the last usable message of images.front", rig.beats[35].message)
    assert rig.beats[-1].message == "controlling"


def test_silent_joints_end_the_run_after_stop_after():
    rig = Rig(before=lambda step: rig.silent.add("/joint_states") if step == 12 else None, stop_after=2.0)
    with pytest.raises(TimeoutError, match=r"No usable observation for 2 s \(stop_after\): .* state \(/joint_states\)"):
        rig.run(steps=200)
    assert rig.clock.step < 50
    rig.control.beat()
    status = rig.ros.sent["/diagnostics"][-1].status[0]
    assert status.level == 2
    assert status.message.startswith("stopped: No usable observation")


def test_error_of_the_server_sends_velocities_of_zero():
    def answers(observation):
        if len(rig.server.requests) > 3:
            raise ServerError("no such camera", "bad_observation")
        return np.full((8, 2), 57.29578)

    rig = Rig(
        answers,
        metadata={**METADATA, "action_commands": ["velocity", "velocity"]},
        actions=[{"topic": "/commands", "type": ARRAY, "dimensions": ["hand", "arm"]}],
    )
    with pytest.raises(ServerError, match="no such camera"):
        rig.run(steps=100)
    sent = [message.data.tolist() for message in rig.ros.sent["/commands"]]
    np.testing.assert_allclose(sent[0], [0.05 * 0.5729578, 1], rtol=1e-6)  # hand before arm, without the offset
    assert sent[-1] == [0, 0]


def test_nan_in_actions_never_reaches_a_topic():
    rig = Rig(lambda observation: np.full((8, 2), np.nan))
    report = rig.run()
    assert "NaN" in report.stopped
    assert rig.positions == []
    rig.control.beat()
    assert rig.ros.sent["/diagnostics"][-1].status[0].level == 2


def test_dry_run_publishes_no_command():
    rig = Rig(control={"dry_run": True})
    assert rig.run().actions > 10
    assert rig.positions == []


def test_first_command_is_one_step_from_the_present_position(caplog):
    rig = Rig(
        lambda observation: np.full((8, 2), 90.0),
        metadata={**METADATA, "action_range": {"low": [50, 0], "high": [100, 100]}},
        limits={"arm": {"max_step": 2}},
    )
    rig.run()
    angles = [degrees(position[0]) for position in rig.positions]
    assert angles[:3] == pytest.approx([degrees(0.5), degrees(0.5) + 2, degrees(0.5) + 4])  # held until the first chunk
    assert "arm is at 28.65, outside the training range, 50 to 100" in caplog.text


def test_instruction_from_topic():
    rig = Rig(
        before=lambda step: rig.ros.send("/prompt", text(" stop ")) if step == 10 else None, prompt_topic="/prompt"
    )
    rig.run()
    assert [rig.server.requests[i]["prompt"] for i in (0, -1)] == ["go", "stop"]


def test_node_waits_for_instruction_from_topic():
    rig = Rig(prompt=None, prompt_topic="/prompt", wait=3, monotonic=itertools.count().__next__, max_age=100)
    with pytest.raises(TimeoutError, match="No observation after 3 s: no instruction received on /prompt"):
        rig.run()


def test_rtc_fields_reach_the_server_with_the_observation():
    rig = Rig(metadata={**METADATA, RTC: True}, control={"mode": "rtc"})
    rig.run()
    request = rig.server.requests[-1]
    assert request[RTC]["action_prefix"].shape[1] == 2
    assert set(request) == {"images", "state", "prompt", RTC}


def test_silent_topic_is_named_with_its_publishers():
    rig = Rig(wait=0.5, monotonic=itertools.count().__next__)
    rig.ros.other_publishers = {"/front": [COMPRESSED]}
    with pytest.raises(
        TimeoutError,
        match=r"No observation after 0.5 s: no usable message of images.front .*/front is published as .*Compressed.*; "
        r"nothing publishes /joint_states",
    ):
        rig.control.run()
    assert rig.positions == []


def test_command_topic_without_listener_is_logged(caplog):
    rig = Rig()
    rig.ros.listeners = {"/arm/joint_trajectory": [ARRAY]}
    rig.run()
    assert f"Nothing subscribes to /arm/joint_trajectory as {TRAJECTORY}, only as {ARRAY}" in caplog.text
    caplog.clear()
    rig = Rig()
    rig.ros.listeners = {"/arm/joint_trajectory": [TRAJECTORY]}
    rig.run()
    assert "Nothing subscribes" not in caplog.text
    assert "publish" not in caplog.text


def test_topics_of_several_publishers_are_logged(caplog):
    rig = Rig()
    rig.ros.other_publishers = {
        "/arm/joint_trajectory": [TRAJECTORY] * 2,
        "/front": [IMAGE] * 2,
        "/joint_states": ["any"] * 2,
    }
    rig.run()
    assert "1 other publishers of /arm/joint_trajectory: the robot also gets their commands" in caplog.text
    assert "images.front (/front) has 2 publishers" in caplog.text
    assert "/joint_states" not in caplog.text  # joints of several publishers are distinguished by name


def test_simulated_time_sets_the_pace():
    rig = Rig(time="arrival", monotonic=lambda: 0.0)
    ticks = itertools.count(1000 * 1000)
    rig.ros.now = lambda: next(ticks) / 1000  # each call advances the time by a millisecond
    rig.control = Control(
        settings(time="arrival"),
        rig.ros,
        connect=rig.server,
        simulated=True,
        make_inference=lambda policy: DirectInference(policy, rig.ros),
        monotonic=lambda: 0.0,
    )
    assert rig.run(steps=3).steps == 3
    assert 0.3 <= next(ticks) / 1000 - 1000 < 0.4


def test_damaged_images_hold_the_robot_and_are_named():
    def front():
        message = compressed(np.zeros((8, 8, 3), np.uint8), "jpeg", rig.ros.time)
        if rig.clock.step >= 12:
            message.data = message.data[:200]
        return message

    rig = Rig(cameras={"images.front": {"topic": "/front", "type": COMPRESSED}}, stop_after=3.0)
    rig.front = front
    with pytest.raises(TimeoutError, match=r"for 3 s .* images.front .*: cannot decode 200 bytes"):
        rig.run(steps=100)
    assert "cannot decode 200 bytes" in rig.beats[-1].message


def test_stop_while_waiting_for_topics():
    rig = Rig()
    rig.control.stop()
    assert rig.control.run() is None
    rig.control.beat()
    status = rig.ros.sent["/diagnostics"][-1].status[0]
    assert (status.level, status.message.partition(":")[0]) == (1, "stopped")
