"""A robot whose server dies, comes back, or stands still in the middle of a run, all of it real: the processes, the
websocket, the clock.

Each action says which of the robot's actions it is meant to be, and which observation it answers. As a script this file
is the server.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from torchpi import Pi0Config
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi_client import ControlLoop, ControlSettings, WebsocketPolicy

HZ, HORIZON, EXECUTE_STEPS = 50.0, 100, 30
PASS_SECONDS = 0.2
MAX_AGE = HORIZON / HZ
PATIENCE = 120.0  # a test that waits so long has failed


class CountingPolicy:
    """Observation (n executed actions, moment) → actions (n + 1, moment), (n + 2, moment), …"""

    engine = None

    def __init__(self) -> None:
        self.model = types.SimpleNamespace(config=Pi0Config(action_horizon=HORIZON, action_dim=2))
        self.embodiment = Embodiment.generic(
            "counter",
            cameras={"base_0_rgb": "camera"},
            state=["executed", "moment"],
            actions=["number_velocity", "moment_velocity"],
            control_hz=HZ,
            execute_steps=EXECUTE_STEPS,
        )
        self.metadata = {"control_hz": HZ, "execute_steps": EXECUTE_STEPS, "action_commands": ["velocity"] * 2}

    def example_observation(self):
        return self.embodiment.example_observation()

    def prepare(self, observation):
        return self.embodiment.to_model(observation)

    def infer_batch(self, observations, *, noise, num_steps, prefixes=None):
        time.sleep(PASS_SECONDS)
        return [self._answer(*pair) for pair in zip(observations, prefixes or [None] * len(observations), strict=True)]

    def _answer(self, observation, prefix):
        executed, moment = observation["state"]
        # The second request of the warm-up has a prefix without a past.
        if prefix is not None and executed and prefix.actions[0, 0] != executed + 1:
            raise RuntimeError(f"after {executed} actions the prefix begins with number {prefix.actions[0, 0]}")
        actions = np.stack([executed + 1 + np.arange(HORIZON), np.full(HORIZON, moment)], axis=1)
        return {"actions": actions.astype(np.float32), "policy_timing": {}}


def serve(port):
    """Until the process is killed."""
    with running_server({"counter": CountingPolicy}, ServeSettings(port=port, max_batch=1)):
        threading.Event().wait()


class CountingRobot:
    """Holding is a velocity of 0, and no action is."""

    def __init__(self):
        self.start = time.monotonic()
        self.commands = []  # [number, moment]
        self.observed = threading.Event()

    def moment(self):
        return time.monotonic() - self.start

    def observe(self):
        state = np.array([len(self.executed), self.moment()], np.float32)
        self.observed.set()
        return {"camera": np.zeros((4, 4, 3), np.uint8), "state": state, "prompt": "count"}

    def act(self, action):
        self.commands.append(action)

    @property
    def executed(self):
        return [command for command in self.commands if command[0] != 0]


class Server:
    """A server in a process of its own, always on the same port."""

    def __init__(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.start()

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, str(self.port)], env=environment)

    def kill(self):
        self.process.kill()  # also one that is stopped
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Run:
    """A control loop in a thread."""

    def __init__(self, policy, mode):
        self.robot = CountingRobot()
        self._loop = ControlLoop(self.robot, policy, ControlSettings(mode=mode))
        self.report = self._loop.report
        self._problem = None
        self._thread = threading.Thread(target=self._control, daemon=True)
        self._thread.start()

    def _control(self):
        try:
            self._loop.run()
        except Exception as error:
            self._problem = error

    def until(self, condition):
        """Wait for what this and other processes are about to do; the run continues."""
        pause, end = threading.Event(), time.monotonic() + PATIENCE
        while not condition():
            self._check()
            assert self._thread.is_alive(), self.report.stopped
            assert time.monotonic() < end, f"it did not happen: {self.report.summary()}"
            pause.wait(0.005)

    def until_a_request_is_under_way(self):
        """After some chunks, with nearly a whole pass of the model ahead."""
        self.until(lambda: self.report.chunks >= 2)
        self.robot.observed.clear()
        self.until(self.robot.observed.is_set)
        time.sleep(PASS_SECONDS / 4)

    def stop(self):
        self._loop.stop()
        self._thread.join(PATIENCE)
        self._check()
        assert self.report.stopped is None

    def _check(self):
        if self._problem is not None:
            raise self._problem


@contextlib.contextmanager
def running(server, mode, answer_timeout):
    url = f"ws://127.0.0.1:{server.port}"
    with WebsocketPolicy(url, timeout=PATIENCE, answer_timeout=answer_timeout) as policy:
        run = Run(policy, mode)
        try:
            yield run
        finally:
            run.stop()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async", "rtc"])
def test_a_server_that_is_killed_and_restarted_costs_time_and_no_wrong_action(server, mode):
    with running(server, mode, answer_timeout=1.0) as run:
        robot, report = run.robot, run.report
        run.until_a_request_is_under_way()
        server.kill()
        killed = robot.moment()
        run.until(lambda: report.failed_requests >= 2)  # the robot is held, and the loop asks on
        before, chunks = len(robot.executed), report.chunks
        server.start()
        run.until(lambda: report.chunks >= chunks + 3)
    assert report.reconnects >= 1
    numbers, moments = np.array(robot.executed).T
    # Each action was executed once, in its turn, and none was left out; everything else was holding still.
    np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
    assert (moments[:before] < killed).all()
    assert (moments[before:] > killed).all()
    assert len(numbers) >= before + 2 * EXECUTE_STEPS
    assert (report.waits if mode == "sync" else report.holds) > 0
    assert report.actions == len(numbers)
    assert robot.commands[-1].tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "rtc"])
def test_stale_chunk_of_a_stopped_server_is_refused(server, mode):
    with running(server, mode, answer_timeout=PATIENCE) as run:
        robot, report = run.robot, run.report
        run.until_a_request_is_under_way()
        stale = report.stale_chunks
        server.process.send_signal(signal.SIGSTOP)
        stopped = robot.moment()
        run.until(lambda: robot.moment() > stopped + 1.5 * MAX_AGE)
        before = len(robot.executed)
        server.process.send_signal(signal.SIGCONT)
        run.until(lambda: report.stale_chunks > stale)
        chunks = report.chunks
        run.until(lambda: report.chunks >= chunks + 2)
    assert report.stale_chunks == stale + 1
    assert report.holds > 0
    assert report.reconnects == 0
    numbers, moments = np.array(robot.executed).T
    np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
    assert (moments[:before] < stopped).all()
    assert (moments[before:] > stopped + MAX_AGE).all()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
