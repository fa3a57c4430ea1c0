import contextlib
import json
import multiprocessing
import threading

import guidance
import numpy as np
import pytest

from torchpi.bench.serve import PausePolicy, run_bench_serving, serve_minimal, serve_policy
from torchpi_client import WebsocketPolicy


@contextlib.contextmanager
def in_thread(serve, *arguments):
    """Address of a server in a thread, which avoids importing everything again in a process."""
    pipe, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, *arguments))
    thread.start()
    yield pipe.recv()
    pipe.close()
    thread.join()


def test_minimal_server_answers_like_torchpi_server():
    observation = PausePolicy(0.0).example_observation()
    answers = []
    for serve, arguments in ((serve_policy, (1.0, 2)), (serve_minimal, (1.0,))):
        with in_thread(serve, *arguments) as address, WebsocketPolicy(address) as client:
            answers.append(client.infer(observation))
    for answer in answers:
        np.testing.assert_array_equal(answer["actions"], np.tile(observation["state"], (50, 1)).astype(np.float32))
        assert answer["server_timing"]["infer_ms"] >= 1.0


@pytest.mark.slow
def test_guidance_is_timed_next_to_plain_sampling(capsys):
    guidance.main(models=("demo", "tiny"), pairs=1, as_json=True)
    for name, result in zip(("demo", "tiny"), json.loads(capsys.readouterr().out), strict=True):
        assert result["model"] == name
        assert result["ratio"] == pytest.approx(result["guided_seconds"] / result["plain_seconds"])


def test_sizes_are_checked():
    sizes = {"model_ms": 1.0, "runs": 1, "requests": 10, "clients": 1, "seconds": 1.0}
    for name, value in (("runs", 0), ("requests", 1), ("clients", 0), ("seconds", 0.0), ("model_ms", -1.0)):
        with pytest.raises(ValueError, match=name):
            run_bench_serving(**{**sizes, name: value})
