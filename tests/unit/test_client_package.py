"""torchpi-client as a package: its command, and its wheel in an otherwise empty environment."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from websockets.sync.server import serve

from torchpi_client import pack, unpack
from torchpi_client.__main__ import load_observation, main
from torchpi_client.protocol import JPEG

CLIENT = pathlib.Path(__file__).parents[2] / "client"


@contextlib.contextmanager
def policy_server(metadata, answer):
    """Run a server in a thread; yield its URL and the requests it received."""
    requests = []

    def handler(connection):
        connection.send(pack(metadata))
        for request in connection:
            requests.append(unpack(request))
            connection.send(answer)

    with serve(handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def observation_file(tmp_path):
    path = tmp_path / "observation.npz"
    image = np.zeros((8, 10, 3), np.uint8)
    np.savez(path, **{"images.top": image, "state": np.ones(2), "prompt": np.array("pick up the fork")})
    return path


def test_load_observation_reads_nested_keys(observation_file, tmp_path):
    observation = load_observation(str(observation_file))
    assert observation["images"]["top"].shape == (8, 10, 3)
    assert observation["prompt"] == "pick up the fork"
    assert pack(observation)
    np.save(tmp_path / "array.npy", np.ones(2))
    with pytest.raises(ValueError, match=r"array.npy holds one array; expected an .npz"):
        load_observation(str(tmp_path / "array.npy"))
    (tmp_path / "arm.py").write_text("import arm\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"arm.py is not an .npz file; np.savez"):
        load_observation(str(tmp_path / "arm.py"))


def test_command_sends_token_of_environment(observation_file, monkeypatch, capsys):
    def handler(connection):
        seen.append(connection.request.headers["Authorization"])
        connection.send(pack({}))
        for _ in connection:
            connection.send(pack({"actions": np.ones((1, 1), np.float32)}))

    seen = []
    monkeypatch.setenv("TORCHPI_TOKEN", "of the environment")
    with serve(handler, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        for arguments in ([], ["--api-key", "given"]):
            assert main([url, "--dry-run", "--observation", str(observation_file), *arguments]) == 0
        server.shutdown()
        thread.join()
    assert seen == ["Api-Key of the environment", "Api-Key given"]
    assert "of the environment" not in capsys.readouterr().out


def test_command_prints_chunks(observation_file, capsys):
    chunk = np.array([[0.25, 5], [0.5, np.nan]], np.float32)
    metadata = {"action_names": ["arm", "hand"], "action_limits": {"low": [0, 0], "high": [1, 1]}, JPEG: True}
    with policy_server(metadata, pack({"actions": chunk})) as (url, requests):
        arguments = [url, "--dry-run", "--observation", str(observation_file)]
        assert main([*arguments, "--chunks", "2"]) == 0
        out = capsys.readouterr().out
        assert out.count("[2, 2] after") == out.count("arm") == 2
        assert out.count("0.5000") == out.count("5.0000!") == out.count("nan!") == 2
        assert requests[0]["prompt"] == "pick up the fork"
        assert main([*arguments, "--jpeg", "90"]) == 0
        assert "images.top: 0 kB raw" in capsys.readouterr().out
        assert set(requests[2]["images"]["top"]) == {JPEG, "layout"}


def test_command_errors_are_one_line(observation_file, capsys):
    with policy_server({}, "no camera 'top'") as (url, _):
        assert main([url, "--dry-run", "--observation", str(observation_file)]) == 1
    assert "no camera 'top'" in capsys.readouterr().err
    assert main(["ws://127.0.0.1:1", "--dry-run", "--observation", "missing.npz"]) == 1
    assert "missing.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ws://127.0.0.1:1", "--observation", str(observation_file)])
    assert "--dry-run" in capsys.readouterr().err


CONTROL = """
import sys
import numpy as np
from torchpi_client import ControlLoop, WebsocketPolicy


class Robot:
    def observe(self):
        return {"state": np.zeros(2, np.float32)}

    def act(self, action):
        self.last = action


with WebsocketPolicy(sys.argv[1]) as policy:
    robot = Robot()
    report = ControlLoop(robot, policy).run(steps=100)
    print(robot.last.tolist(), report.actions > 0)
"""
"""A control loop in two seconds."""


@pytest.mark.slow
def test_wheel_works_in_empty_environment(tmp_path):
    """Install from the package index, as on a robot's computer; TORCHPI_CLIENT_PYTHON names another Python."""

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = str(tmp_path / "venv" / "bin" / "python")
    run(os.environ.get("TORCHPI_CLIENT_PYTHON", sys.executable), "-m", "venv", str(tmp_path / "venv"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(CLIENT))
    (wheel,) = tmp_path.glob("torchpi_client-*.whl")
    run(python, "-m", "pip", "install", "--disable-pip-version-check", str(wheel))
    code = "import torchpi_client, sys; print(sorted({'torch', 'PIL', 'torchpi'} & set(sys.modules)), torchpi_client)"
    assert run(python, "-W", "error", "-c", code).startswith("[] <module")
    chunk = np.ones((3, 2), np.float32)
    np.savez(tmp_path / "observation.npz", state=np.ones(2))
    metadata = {"action_names": ["arm", "hand"], "action_commands": ["position"] * 2, "control_hz": 50}
    with policy_server(metadata, pack({"actions": chunk})) as (url, _):
        out = run(python, "-m", "torchpi_client", url, "--dry-run", "--observation", str(tmp_path / "observation.npz"))
        controlled = run(python, "-W", "error", "-c", CONTROL, url)
    assert "arm" in out
    assert controlled == "[1.0, 1.0] True\n"
    # Only JPEG needs another package; the error names it.
    code = "from torchpi_client.images import encode_images; import numpy as np\n"
    code += "encode_images({'a': np.zeros((2, 2, 3), np.uint8)})"
    failed = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert "pip install 'torchpi-client[jpeg]'" in failed.stderr
