"""The real openpi-client, as it comes from PyPI, against a server with the packaged policy."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from serving_helpers import FakePolicy, observation, one_thread, served

from torchpi.policy import load_policy

# openpi-client 0.1.2 uses websockets in a way that its newest versions warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

broker = pytest.importorskip("openpi_client.action_chunk_broker")
websocket_client_policy = pytest.importorskip("openpi_client.websocket_client_policy")


@pytest.fixture
def connect():
    """`WebsocketClientPolicy`, closed at the end, which it has no method for."""
    policies = []

    def connect(url, **arguments):
        policies.append(websocket_client_policy.WebsocketClientPolicy(url, **arguments))
        return policies[-1]

    yield connect
    for policy in policies:
        policy._ws.close()


@one_thread()
def test_openpi_websocket_client_gets_metadata_and_chunks(connect):
    policy = load_policy("demo", device="cpu")
    request = {**policy.example_observation(), "state": np.array([0.0, 0.6, 0.2, 1.0])}
    with served(policy_of(policy), num_steps=2, seed=5, max_batch=1) as (url, _):
        client = connect(url)
        metadata = client.get_server_metadata()
        assert metadata["embodiment"] == "metaworld"
        assert metadata["action_horizon"] == 16
        first, second = client.infer(request), client.infer(request)
        assert first["actions"].shape == (16, 4)
        assert first["actions"].dtype == np.float32
        assert not np.array_equal(first["actions"], second["actions"])
        assert set(first["policy_timing"]) == {"preprocess_ms", "infer_ms", "postprocess_ms"}
        assert first["server_timing"]["infer_ms"] > 0
        assert second["server_timing"]["prev_total_ms"] > 0


def policy_of(policy):
    policy.release = lambda: None
    return policy


def test_openpi_client_connects_with_host_port_and_api_key(connect):
    with served(FakePolicy(), token="s3cret") as (url, _):
        host, port = url.removeprefix("ws://").split(":")
        client = connect(host, port=int(port), api_key="s3cret")
        assert client.get_server_metadata()["reset_pose"] == [0.0, -1.5]
        assert client.infer(observation())["actions"].shape == (4, 2)
        with pytest.raises(Exception, match="401"):
            connect(url, api_key="wrong")


def test_openpi_action_chunk_broker_steps_through_chunks(connect):
    policy = FakePolicy()
    with served(policy) as (url, _):
        actions = broker.ActionChunkBroker(connect(url), action_horizon=3)
        steps = [actions.infer(observation(float(i)))["actions"] for i in range(5)]
        assert [step.shape for step in steps] == [(2,)] * 5
        assert policy.batches == [[0.0], [3.0]]
        assert len({step.tobytes() for step in steps}) == 5


def test_openpi_client_waits_for_the_warm_up(connect):
    policy = FakePolicy(held=True)
    with served(policy) as (url, _):
        found = []
        thread = threading.Thread(target=lambda: found.append(connect(url).get_server_metadata()))
        thread.start()
        policy.wait_until_begun()
        assert not found
        policy.release()
        thread.join()
        assert found[0]["embodiment"] == "fake"


def test_an_error_is_raised_with_its_message_and_the_connection_stays(connect):
    with served(FakePolicy()) as (url, _):
        client = connect(url)
        with pytest.raises(RuntimeError, match=r"bad_observation.*no image 'camera'"):
            client.infer({"state": np.zeros(2)})
        assert "actions" in client.infer(observation())


@pytest.mark.slow
def test_serve_command_ends_on_sigterm_and_keeps_the_recording(connect, tmp_path):
    command = [sys.executable, "-m", "torchpi.cli", "serve", "demo", "--port", "0", "--max-batch", "1"]
    command += ["--device", "cpu", "--default-prompt", "open the drawer", "--record", str(tmp_path / "set")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "listening at" in line)
            client = connect(line.split("listening at ")[1].split(",")[0])
            assert client.get_server_metadata()["default_prompt"] == "open the drawer"
            request = load_policy("demo", device="cpu").example_observation()
            del request["prompt"]
            assert client.infer(request)["actions"].shape == (16, 4)
        finally:
            process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    from torchpi.data import LeRobotDataset

    assert LeRobotDataset(tmp_path / "set", action_horizon=1)[0]["task"] == "open the drawer"
