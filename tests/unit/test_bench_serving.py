import contextlib
import multiprocessing
import threading

import numpy as np
import pytest

from torchpi.bench.guided import bench_guided
from torchpi.bench.serving import PausePolicy, bench_serving, serve_loop, serve_policy
from torchpi_client import WebsocketPolicy


@contextlib.contextmanager
def in_thread(serve, *arguments):
    """What `server_process` yields, without a process that would have to import everything again."""
    pipe, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, *arguments))
    thread.start()
    address = pipe.recv()

    def peak_mb():
        pipe.send(None)
        return pipe.recv()

    yield address, peak_mb
    pipe.close()
    thread.join()


def test_the_loop_answers_as_the_server_does():
    observation = PausePolicy(0.0).example_observation()
    answers = []
    for serve, arguments in ((serve_policy, (1.0, 2)), (serve_loop, (1.0,))):
        with in_thread(serve, *arguments) as (address, peak_mb):
            with WebsocketPolicy(address) as client:
                answers.append(client.infer(observation))
            assert peak_mb() > 10
    for answer in answers:
        np.testing.assert_array_equal(answer["actions"], np.tile(observation["state"], (50, 1)).astype(np.float32))
        assert answer["server_timing"]["infer_ms"] >= 1.0


@pytest.mark.slow
def test_guidance_is_timed_beside_plain_sampling_of_a_policy():
    result = bench_guided("demo", pairs=1)
    assert result.model == "demo"
    assert result.ratio == pytest.approx(result.guided_seconds / result.plain_seconds)


def test_sizes_are_checked():
    sizes = {"model_ms": 1.0, "runs": 1, "requests": 10, "clients": 1, "seconds": 1.0, "guided": [], "pairs": 1}
    for name, value in (
        ("runs", 0),
        ("requests", 1),
        ("clients", 0),
        ("seconds", 0.0),
        ("pairs", 0),
        ("model_ms", -1.0),
    ):
        with pytest.raises(ValueError, match=name):
            bench_serving(**{**sizes, name: value})
