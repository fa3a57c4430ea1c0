"""A policy whose every pass a test controls, and a client that sees each frame."""

import contextlib
import threading
import types
import urllib.error
import urllib.request

import numpy as np
import torch
from websockets.sync.client import connect

import torchpi
from torchpi.bench.serve import announce
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi_client import pack, unpack

H, A = 4, 3
SECONDS = 20.0  # a test that waits this long has failed


@contextlib.contextmanager
def one_thread():
    """PyTorch has a pool of threads for each thread that uses it; on a small machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakePolicy:
    """Its actions are noise · num_steps + state, [4, 2]. It waits at the beginning of each pass while it is held."""

    engine = None

    def __init__(self, *, held=False, **fields):
        self.model = types.SimpleNamespace(config=torchpi.Pi0Config(action_horizon=H, action_dim=A))
        self.embodiment = Embodiment.generic(
            "fake",
            cameras={"base_0_rgb": "camera"},
            state=["x", "y"],
            actions=["x", "y"],
            control_hz=10,
            execute_steps=2,
            default_prompt="go",
            metadata={"reset_pose": [0.0, -1.5], **fields},
        )
        self.batches = []
        """Per pass after the warm-up the states' first numbers."""
        self.prefixes = []
        """Per pass those of its requests."""
        self.failure = None
        """Raised by each pass."""
        self._free = threading.Event()
        self._begun = threading.Semaphore(0)
        if not held:
            self._free.set()

    @property
    def metadata(self):
        return {"embodiment": "fake", "default_prompt": "go", **self.embodiment.metadata}

    def example_observation(self):
        return observation(-1.0)

    def prepare(self, observation):
        return self.embodiment.to_model(observation)

    def infer_batch(self, observations, *, noise, num_steps, prefixes=None):
        samples = [self.prepare(observation) for observation in observations]
        firsts = [float(sample["state"][0]) for sample in samples]
        if -1.0 not in firsts:
            self.batches.append(firsts)
            self.prefixes.append(prefixes)
        self._begun.release()
        assert self._free.wait(SECONDS)
        if self.failure is not None:
            raise self.failure
        return [
            {
                "actions": (one[:, :2] * (num_steps or 10) + sample["state"]).astype(np.float32),
                "policy_timing": {"infer_ms": 1.0},
            }
            for sample, one in zip(samples, noise, strict=True)
        ]

    def hold(self):
        """From now on every pass waits at its beginning."""
        self._free.clear()
        while self._begun.acquire(blocking=False):
            pass

    def wait_until_begun(self):
        """Wait for the beginning of a pass that was not waited for yet."""
        assert self._begun.acquire(timeout=SECONDS)

    def release(self):
        self._free.set()


def observation(first=0.0, **fields):
    return {"camera": np.zeros((6, 8, 3), np.uint8), "state": np.array([first, 2.0], np.float32), **fields}


@contextlib.contextmanager
def served(*policies, recorder=None, view=None, **settings):
    """A server of these policies as /p0, /p1, …; they are released at the end, so that it can end."""
    load = {f"p{i}": lambda policy=policy: policy for i, policy in enumerate(policies)}
    settings = ServeSettings(**{"port": 0, "max_batch": 3, **settings})
    with running_server(load, settings, recorder=recorder, view=view) as (address, server):
        try:
            yield address, server
        finally:
            for policy in policies:
                policy.release()


def serve_fake(pipe, settings):
    """`served` in a process of its own, for `server_process`."""
    with served(FakePolicy(), **settings) as (address, _):
        announce(pipe, address)


class Client:
    """A connection, frame by frame."""

    def __init__(self, url, stack, **arguments):
        connection = connect(url, compression=None, proxy=None, open_timeout=SECONDS, **arguments)
        self.socket = stack.enter_context(connection)

    def metadata(self):
        return unpack(self.socket.recv(timeout=SECONDS))

    def send(self, request):
        self.socket.send(request if isinstance(request, str | bytes) else pack(request))

    def receive(self):
        """The answer; an error is a str."""
        frame = self.socket.recv(timeout=SECONDS)
        return frame if isinstance(frame, str) else unpack(frame)

    def ask(self, request):
        self.send(request)
        return self.receive()


@contextlib.contextmanager
def clients(url, count=1, **arguments):
    """Connections that have read their metadata."""
    with contextlib.ExitStack() as stack:
        found = [Client(url, stack, **arguments) for _ in range(count)]
        for client in found:
            client.metadata()
        yield found


def http(url, path, authorization=None):
    """Status and text of a plain HTTP request."""
    request = urllib.request.Request(url.replace("ws://", "http://") + path)
    if authorization:
        request.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric(url, line, authorization=None):
    """The value of one line of /metrics, 0 if it is not there."""
    _, text = http(url, "/metrics", authorization)
    values = [float(each.rpartition(" ")[2]) for each in text.splitlines() if each.rpartition(" ")[0] == line]
    return values[0] if values else 0.0


def until(condition):
    """Wait for what another thread is about to do; the tests have no other way to see it."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen")
