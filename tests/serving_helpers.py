"""Policy whose forward passes a test controls, and a client that works frame by frame."""

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
SECONDS = 20.0  # time limit of every wait in the tests


@contextlib.contextmanager
def one_thread():
    """Use one PyTorch thread: each calling thread has its own pool, and pools compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakePolicy:
    """Policy whose actions [4, 2] are noise · num_steps + state. While held, forward passes wait at their beginning."""

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
        """First state values of each batch after the warm-up."""
        self.prefixes = []
        """Previous chunks of each batch after the warm-up."""
        self.failure = None
        """Error raised by each forward pass."""
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
        """Make every forward pass wait at its beginning from now on."""
        self._free.clear()
        while self._begun.acquire(blocking=False):
            pass

    def wait_until_begun(self):
        """Wait for the next forward pass to begin."""
        assert self._begun.acquire(timeout=SECONDS)

    def release(self):
        self._free.set()


def observation(first=0.0, **fields):
    return {"camera": np.zeros((6, 8, 3), np.uint8), "state": np.array([first, 2.0], np.float32), **fields}


@contextlib.contextmanager
def served(*policies, recorder=None, view=None, **settings):
    """Serve these policies as /p0, /p1, …, and release them at the end so that the server can stop."""
    load = {f"p{i}": lambda policy=policy: policy for i, policy in enumerate(policies)}
    settings = ServeSettings(**{"port": 0, "max_batch": 3, **settings})
    with running_server(load, settings, recorder=recorder, view=view) as (address, server):
        try:
            yield address, server
        finally:
            for policy in policies:
                policy.release()


def serve_fake(pipe, settings):
    """Run `served` in a separate process, for `server_process`."""
    with served(FakePolicy(), **settings) as (address, _):
        announce(pipe, address)


class Client:
    """Connection to a server, frame by frame."""

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
        connected = [Client(url, stack, **arguments) for _ in range(count)]
        for client in connected:
            client.metadata()
        yield connected


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
    """Value of a line of /metrics, 0 if it is missing."""
    _, text = http(url, "/metrics", authorization)
    values = [float(each.rpartition(" ")[2]) for each in text.splitlines() if each.rpartition(" ")[0] == line]
    return values[0] if values else 0.0


def until(condition):
    """Poll a condition that another thread will make true."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("the condition did not become true")
