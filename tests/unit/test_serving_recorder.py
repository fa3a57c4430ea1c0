"""Recording of served requests as a LeRobot dataset."""

import dataclasses
import logging
import re
import shutil

import numpy as np
import pytest
from serving_helpers import FakePolicy, H, clients, observation, served, until

from torchpi.data import LeRobotDataset
from torchpi.robots import Camera, StateKey
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder, camera_fields, request_frame

pytest.importorskip("pyarrow")


def test_requests_and_chunks_are_recorded_as_a_dataset(tmp_path):
    metrics = Metrics()
    with (
        Recorder({"p0": tmp_path / "set"}, metrics) as recorder,
        served(FakePolicy(), recorder=recorder) as (url, _),
        clients(url, 2) as [client, other],
    ):
        image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
        sent = [client.ask({**observation(float(i)), "camera": image, "prompt": "push"}) for i in (1, 2)]
        sent.append(client.ask(observation(3.0, prompt="pull")))
        sent.append(other.ask(observation(4.0)))
        assert isinstance(other.ask({"state": 0}), str)
    kept = LeRobotDataset(tmp_path / "set", action_horizon=1)
    frames = sorted((kept[i] for i in range(len(kept))), key=lambda frame: frame["observation.state"][0])
    assert [frame["task"] for frame in frames] == ["push", "push", "pull", "go"]
    np.testing.assert_array_equal(frames[0]["observation.images.camera"], image)
    for frame, answer in zip(frames, sent, strict=True):
        np.testing.assert_array_equal(frame["action"].reshape(H, 2), answer["actions"])
    assert b'torchpi_recorded_total{result="kept"} 4.0' in metrics.text()


def test_largest_episode_is_saved_when_the_memory_of_all_clients_is_full(tmp_path, monkeypatch):
    policy = FakePolicy()
    actions = np.zeros((H, 2), np.float32)
    size = sum(value.nbytes for value in request_frame(policy.embodiment, observation(), actions).values())
    monkeypatch.setattr("torchpi.serving.recorder.EPISODE_MB", 4 * size / 2**20)
    with Recorder({"p0": tmp_path / "set"}, Metrics()) as recorder:
        # Client 0 has the largest episode at the fifth request, client 2 at the eighth; the rest is saved at the end.
        for i, client in enumerate((0, 0, 1, 0, 2, 2, 2, 1, 0)):
            recorder.keep("p0", client, policy, observation(float(i)), actions)
    kept = LeRobotDataset(tmp_path / "set", action_horizon=1)
    episodes = {}
    for i in range(len(kept)):
        episodes.setdefault(int(kept[i]["episode_index"]), []).append(int(kept[i]["observation.state"][0]))
    assert list(episodes.values()) == [[0, 1, 3], [4, 5, 6], [2, 7], [8]]


def test_log_has_the_number_of_recorded_requests_and_the_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torchpi.serving.recorder")
    policy, actions = FakePolicy(), np.zeros((H, 2), np.float32)
    with Recorder({name: tmp_path / name for name in ("arm", "hand", "unused")}, Metrics()) as recorder:
        for name, prompt in (("arm", "push"), ("arm", "push"), ("arm", "pull"), ("hand", "push")):
            recorder.keep(name, 0, policy, observation(prompt=prompt), actions)
    assert [record.getMessage() for record in caplog.records] == [
        f"recorded 3 requests in 2 episodes: {tmp_path / 'arm'}",
        f"recorded 1 request in 1 episode: {tmp_path / 'hand'}",
    ]


def test_requests_that_the_disk_is_too_slow_for_are_counted_as_lost(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torchpi.serving.recorder.MAX_WAITING", 0)
    caplog.set_level(logging.CRITICAL, logger="torchpi.serving.recorder")
    metrics = Metrics()
    with Recorder({"p0": tmp_path / "set"}, metrics) as recorder:
        recorder.keep("p0", 0, FakePolicy(), observation(), np.zeros((H, 2), np.float32))
    assert b'torchpi_recorded_total{result="lost"} 1.0' in metrics.text()
    assert not (tmp_path / "set").exists()


def test_failing_recording_does_not_stop_the_robot(tmp_path, caplog):
    metrics = Metrics()
    caplog.set_level(logging.CRITICAL, logger="torchpi.serving.recorder")
    with (
        Recorder({"p0": tmp_path / "set"}, metrics) as recorder,
        served(FakePolicy(), recorder=recorder) as (url, _),
        clients(url) as [client],
    ):
        client.ask(observation(1.0))
        client.ask(observation(2.0, prompt="another"))
        until((tmp_path / "set" / ".recording" / "reserve").is_file)
        shutil.move(tmp_path / "set" / ".recording", tmp_path / "gone")
        assert "actions" in client.ask(observation(3.0))
        assert "actions" in client.ask(observation(4.0, prompt="another"))
    assert b'torchpi_recorded_total{result="lost"}' in metrics.text()


def two_cameras(base="base", wrist="wrist"):
    """Policy for a robot with an optional wrist camera."""
    policy = FakePolicy()
    cameras = (Camera("base_0_rgb", base), Camera("left_wrist_0_rgb", wrist, presence="optional"))
    policy.embodiment = dataclasses.replace(policy.embodiment, cameras=cameras)
    return policy


def image(height, width, value=9):
    return np.full((height, width, 3), value, np.uint8)


def recorded(path, policy, requests, *, metrics=None):
    """Record requests, pairs of client and fields, and return the dataset's frames."""
    with Recorder({"p0": path}, metrics or Metrics()) as recorder:
        for i, (client, fields) in enumerate(requests):
            sent = {"state": np.array([i, 0.0], np.float32), "prompt": "push", **fields}
            recorder.keep("p0", client, policy, sent, np.zeros((H, 2), np.float32))
    kept = LeRobotDataset(path, action_horizon=1)
    return [kept[i] for i in range(len(kept))]


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 1, 0), (1, 0, 1)])
def test_absent_optional_camera_is_black_in_its_own_size(tmp_path, order):
    sent = [{"base": image(12, 16)}, {"base": image(12, 16), "wrist": image(6, 6)}]
    frames = recorded(tmp_path / "set", two_cameras(), [(0, sent[i]) for i in order])
    images = [frame["observation.images.wrist"] for frame in frames]
    np.testing.assert_array_equal(images, [image(6, 6, 9 * i) for i in order])


def test_optional_camera_absent_from_the_first_episode_gets_another_cameras_size(tmp_path):
    alone, both = {"base": image(12, 16)}, {"base": image(12, 16), "wrist": image(12, 16)}
    requests = [(0, alone), (0, {**alone, "prompt": "pull"}), (0, {**both, "wrist": image(6, 6)}), (0, both)]
    frames = recorded(tmp_path / "set", two_cameras(), requests)
    assert [int(frame["observation.state"][0]) for frame in frames] == [0, 1, 3]
    images = [frame["observation.images.wrist"] for frame in frames]
    np.testing.assert_array_equal(images, [image(12, 16, value) for value in (0, 0, 9)])


def test_mismatched_requests_are_lost_and_logged_once_per_client(tmp_path, caplog):
    metrics = Metrics()
    good, large, huge = {"base": image(6, 8)}, {"base": image(12, 16)}, np.array([1e300, 0.0])
    requests = [(0, good), (0, large), (1, large), (0, large), (1, good), (0, {**good, "state": huge}), (0, good)]
    frames = recorded(tmp_path / "set", two_cameras(), requests, metrics=metrics)
    assert sorted(int(frame["observation.state"][0]) for frame in frames) == [0, 4, 6]
    assert b'torchpi_recorded_total{result="lost"} 4.0' in metrics.text()
    assert b'torchpi_recorded_total{result="kept"} 3.0' in metrics.text()
    messages = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert [re.search(r"client (\d)", line)[1] for line in messages] == ["0", "1"]
    assert "observation.images.base has the shape [12, 16, 3], but the dataset has [6, 8, 3]" in messages[0]


def test_cameras_with_equal_last_key_parts_are_recorded_under_their_whole_keys(tmp_path):
    policy = two_cameras("base.rgb", "wrist/rgb")
    [frame] = recorded(tmp_path / "set", policy, [(0, {"base.rgb": image(6, 8), "wrist/rgb": image(4, 4, 5)})])
    np.testing.assert_array_equal(frame["observation.images.base_rgb"], image(6, 8))
    np.testing.assert_array_equal(frame["observation.images.wrist_rgb"], image(4, 4, 5))


def test_recorded_camera_names_are_unique():
    cameras = [Camera(f"c{i}", key) for i, key in enumerate(("base.rgb", "base/rgb", "base_rgb", "images.top"))]
    embodiment = dataclasses.replace(FakePolicy().embodiment, cameras=tuple(cameras))
    fields = camera_fields(embodiment)
    assert len(set(fields.values())) == 4
    assert fields["images.top"] == "observation.images.top"


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt_is_recorded_as_no_instruction(tmp_path, prompt):
    [frame] = recorded(tmp_path / "set", two_cameras(), [(0, {"base": image(6, 8), "prompt": prompt})])
    assert frame["task"] == "(no instruction)"


@pytest.mark.parametrize(
    "sent",
    [
        {"robot.arm.state": [1.0, 2.0]},
        {"robot": {"arm": {"state": [1.0, 2.0]}}},
        {"robot.arm": {"state": [1.0, 2.0]}},
        {"robot": {"arm.state": [1.0, 2.0]}},
        {"robot": {}, "robot.arm": {"state": [1.0, 2.0]}},
    ],
)
def test_nested_flat_and_mixed_keys_are_recorded(tmp_path, sent):
    policy = two_cameras("images.front.rgb", "images.wrist")
    state = (StateKey("robot.arm.state", ("x", "y")),)
    policy.embodiment = dataclasses.replace(policy.embodiment, state=state)
    request = {"prompt": "push", "images.front": {"rgb": image(6, 8)}, **sent}
    policy.embodiment.to_model(request)  # the policy accepts it
    [frame] = recorded(tmp_path / "set", policy, [(0, request)])
    np.testing.assert_array_equal(frame["observation.state"], [1, 2])
    np.testing.assert_array_equal(frame["observation.images.rgb"], image(6, 8))


def test_recording_into_a_used_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        Recorder({"p0": tmp_path}, Metrics())
