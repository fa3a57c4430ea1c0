"""Recordings and live robots in the viewer Rerun; the files are read back with its own reader."""

import io
import json
import logging
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from rrd_helpers import entities, rows, values
from serving_helpers import FakePolicy, H, clients, observation, served

from torchpi.cli import main
from torchpi.data import LeRobotWriter
from torchpi.evaluation.chunks import open_recorded, predict_chunks
from torchpi.evaluation.view import write_view
from torchpi.policy import load_policy
from torchpi.serving.live import LiveView
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi_client import RerunLog, rerun_log

ROBOT = {"control_hz": 10.0, "action_names": ["elbow", "gripper"]}


@pytest.fixture
def dataset(tmp_path):
    """Two episodes of 6 and 4 frames at 10 Hz."""
    with LeRobotWriter(
        tmp_path / "set", fps=10, cameras={"front": (8, 12, 3)}, state_names=["a", "b"], action_names=["a", "g"]
    ) as writer:
        for begin, length in ((0, 6), (10, 4)):
            for i in range(begin, begin + length):
                image = np.full((8, 12, 3), 10 * i, np.uint8)
                frame = {"observation.state": [i, -i], "action": [i + 0.5, 1]}
                writer.add_frame({"observation.images.front": image, **frame})
            writer.save_episode(f"task {begin}")
    return tmp_path / "set"


def test_dataset_is_shown_with_its_frames_times_and_instructions(dataset, tmp_path):
    main(["view", str(dataset), "--save", str(tmp_path / "view.rrd"), "--stride", "3"])
    shown = tmp_path / "view.rrd"
    numbers = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]
    assert rows(shown, "/action/a") == [(i, pytest.approx(i / 10), n + 0.5) for i, n in enumerate(numbers)]
    assert values(shown, "/state/b") == [-n for n in numbers]
    assert [frame for frame, _, _ in rows(shown, "/cameras/front")] == [0, 3, 6, 9]
    assert values(shown, "/prompt") == ["episode 0: task 0", "episode 1: task 10"]
    assert not list(tmp_path.glob(".*tmp"))


def test_selected_episode_begins_at_frame_0_and_keeps_the_clock(dataset, tmp_path):
    main(["view", str(dataset), "--save", str(tmp_path / "view.rrd"), "--episodes", "1"])
    assert rows(tmp_path / "view.rrd", "/action/a")[0] == (0, 0.0, 10.5)


def test_policy_predicts_chunks_over_the_recorded_actions(golden_root, tmp_path):
    source, policy = golden_root / "datasets" / "lerobot_v3_video", load_policy("demo", device="cpu")
    shown = tmp_path / "view.rrd"
    write_view(str(source), shown, policy=policy, every=5, episodes=[0])
    data = open_recorded(policy, source, episodes=[0])
    expected = predict_chunks(policy, data, [0, 5, 10]).predicted[:, 0, :, 0]
    for lane, start in enumerate((0, 5, 10)):  # chunks end with the episode
        found = rows(shown, f"/predicted/delta_x/{lane}")
        assert [frame for frame, _, _ in found] == list(range(start, len(data) + 1))
        np.testing.assert_allclose(
            [value for _, _, value in found[:-1]], expected[lane][: len(data) - start], atol=1e-6
        )
        assert found[-1][2] is None
    assert len(values(shown, "/action/delta_x")) == len(data)


def test_server_recording_is_shown_with_its_chunks(tmp_path):
    policy = FakePolicy()
    robot = tmp_path / "fake.json"
    robot.write_text(json.dumps(policy.embodiment.to_dict()))
    chunk = np.arange(2 * H, dtype=np.float32).reshape(H, 2)
    with Recorder({"p0": tmp_path / "set"}, Metrics()) as recorder:
        for i in range(2):
            recorder.keep("p0", 0, policy, observation(float(i)), chunk + i)
    main(["view", str(tmp_path / "set"), "--embodiment", str(robot), "--save", str(tmp_path / "view.rrd")])
    # Requests are execute_steps / control_hz = 0.2 s apart, actions 0.1 s.
    assert [round(t, 3) for _, t, _ in rows(tmp_path / "view.rrd", "/predicted/x/1")] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert values(tmp_path / "view.rrd", "/predicted/x/1") == [1, 3, 5, 7, None]
    assert "/action/x" not in entities(tmp_path / "view.rrd")
    with pytest.raises(KeyError, match="Unknown embodiment 'fake'"):
        write_view(str(tmp_path / "set"), tmp_path / "other.rrd")
    with pytest.raises(ValueError, match="server's recording of chunks of x, y; embodiment 'so101' has shoulder"):
        write_view(str(tmp_path / "set"), tmp_path / "other.rrd", embodiment="so101")


class DescribedPolicy(FakePolicy):
    @property
    def metadata(self):
        robot = self.embodiment
        names, units = robot.action_names, robot.action_units
        form = {"observation": robot.observation_format, "action_names": names, "action_units": units}
        return {**super().metadata, **form, "control_hz": robot.control_hz}


def test_served_robots_are_shown_by_client(tmp_path):
    target = tmp_path / "live.rrd"
    with LiveView(str(target)) as view:
        with served(DescribedPolicy(), view=view) as (url, _), clients(url, 2) as [one, other]:
            answer = one.ask(observation(1.0))
            other.ask(observation(2.0))
        for client in (0, 1):
            assert view._log.dropped == 0, client
    assert values(target, "/p0\\ 0/state/x") == [1.0]
    assert values(target, "/p0\\ 1/state/x") == [2.0]
    assert values(target, "/p0\\ 0/predicted/y/0") == [*answer["actions"][:, 1].tolist(), None]
    with pytest.raises(ValueError, match=r"live.rrd exists already; choose another file"):
        LiveView(str(target))


def test_full_log_queue_drops_and_counts_entries(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rerun_log, "MAX_WAITING_MB", 1)
    begun, free, written = threading.Event(), threading.Event(), []

    def write(number, values):
        begun.set()
        assert free.wait(20)
        if number == 1:
            raise OSError("disk full")
        written.append(number)

    with RerunLog(tmp_path / "log.rrd") as log:
        log.put(write, 0, np.zeros(10))
        assert begun.wait(20)
        for number in range(1, 6):
            log.put(write, number, np.zeros(300_000, np.uint8))  # three fit into a MiB
        assert log.dropped == 2
        free.set()
    assert written == [0, 2, 3]
    assert log.dropped == 3
    assert "3 entries are missing in Rerun's log" in caplog.text
    assert "disk full" in caplog.text


def test_robots_without_metadata_are_logged_by_array_shapes(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with RerunLog(tmp_path / "log.rrd", wait=True) as log:
        robot = log.robot({})
        robot.observe(0.5, {"image": np.zeros((8, 8, 3), np.uint8), "state": np.array([3.0, 4.0])})
        robot.predict(0.5, np.ones((3, 1)))
    assert values(tmp_path / "log.rrd", "/state/state_1") == [4.0]
    assert [seconds for _, seconds, _ in rows(tmp_path / "log.rrd", "/predicted/0/0")] == [0.5, 1.5, 2.5, 3.5]
    assert "has no control_hz: Rerun's log shows its actions one second apart" in caplog.text


def test_images_of_any_layout_and_range_are_logged(tmp_path):
    cameras = [{"key": "front", "layout": "chw"}, {"key": "depth", "depth_unit": "mm"}]
    image, depth = np.zeros((3, 8, 12), np.float32), np.full((4, 4, 1), 1500, np.uint16)
    with RerunLog(tmp_path / "log.rrd") as log:
        robot = log.robot({**ROBOT, "observation": {"cameras": cameras, "state": []}})
        for i in range(2):
            image[:] = i  # a robot's driver may reuse one buffer
            robot.observe(i / 10, {"front": image, "depth": depth})
    shown = [np.asarray(Image.open(io.BytesIO(bytes(blob)))) for blob in values(tmp_path / "log.rrd", "/cameras/front")]
    assert [(each.shape, int(each.mean())) for each in shown] == [((8, 12, 3), 0), ((8, 12, 3), 255)]
    assert np.frombuffer(bytes(values(tmp_path / "log.rrd", "/cameras/depth")[0]), np.uint16).tolist() == [1500] * 16


def test_overlapping_chunks_are_separate_lines(tmp_path):
    with RerunLog(tmp_path / "log.rrd", wait=True) as log:
        robot = log.robot(ROBOT)
        for i in range(6):
            robot.predict(0.2 * i, np.full((4, 2), i))
    lanes = [values(tmp_path / "log.rrd", f"/predicted/elbow/{lane}") for lane in range(3)]
    assert lanes == [[i, i, i, i, None, i + 3, i + 3, i + 3, i + 3, None] for i in range(3)]


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("somewhere", ValueError, "an .rrd file, or the address of a Rerun viewer"),
        ("nowhere/log.rrd", FileNotFoundError, "There is no folder"),
        ("127.0.0.1:9", ConnectionError, "No Rerun viewer answers at 127.0.0.1:9"),
    ],
)
def test_unwritable_target_is_an_error(target, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        RerunLog(target)


def test_missing_rerun_is_an_error_with_the_command(monkeypatch, dataset, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'rerun-sdk"):
        RerunLog(tmp_path / "log.rrd")
    with pytest.raises(SystemExit):
        main(["view", str(dataset), "--save", str(tmp_path / "view.rrd")])
    assert "Viewing needs the extra 'rerun'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo"], "demo is a policy, not a dataset. Show it on recorded episodes with torchpi view DATASET --policy"),
        (["SET"], "There is no display for the viewer; use --save FILE.rrd or --web"),
        (["SET", "--save", "x.txt"], "expected a file that ends in .rrd"),
        (["SET", "--save", "x.rrd", "--every", "3"], "--every can only be given with --policy"),
        (["SET", "--save", "x.rrd", "--device", "cpu"], "--device can only be given with --policy"),
        (["SET", "--save", "x.rrd", "--stride", "0"], "stride is 0; expected 1 or more"),
        (["SET", "--save", "x.rrd", "--embodiment", "so101"], "has 10 frames per second, and embodiment 'so101'"),
    ],
)
def test_impossible_view_is_an_error(words, message, dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(SystemExit):
        main(["view", *(str(dataset) if word == "SET" else word for word in words)])
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "x.rrd").exists()


def test_web_viewer_listens_on_this_machine_only(dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda words: seen.append(words) or subprocess.CompletedProcess(words, 0))
    main(["view", str(dataset), "--web", "--port", "9123"])
    assert seen[0][1:3] == ["-m", "rerun"]
    assert " ".join(seen[0][4:]) == "--bind 127.0.0.1 --web-viewer --web-viewer-port 9123"


@pytest.mark.slow
def test_demo_writes_the_first_episode_of_its_video(tmp_path):
    words = f"demo --tasks drawer-open --episodes 1 --workers 1 --out {tmp_path / 'demo'}"
    main([*words.split(), "--rerun", str(tmp_path / "demo.rrd")])
    assert set(values(tmp_path / "demo.rrd", "/prompt")) == {"open the drawer"}
    assert len(values(tmp_path / "demo.rrd", "/action/delta_x")) > 20


def test_demo_refuses_an_existing_file_before_it_starts(tmp_path, capsys):
    (tmp_path / "demo.rrd").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "demo"), "--rerun", str(tmp_path / "demo.rrd")])
    assert "demo.rrd exists already" in capsys.readouterr().err
    assert (tmp_path / "demo.rrd").read_bytes() == b"mine"
    assert not (tmp_path / "demo").exists()
