"""Serving with several samples per request: answers, dashboard, metrics, and a control loop that uses the spread."""

import json

import numpy as np
import pytest
from serving_helpers import clients, http, one_thread

from torchpi.policy import load_policy
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi_client import ControlLoop, ControlSettings, WebsocketPolicy


@pytest.fixture(scope="module")
def demo():
    return load_policy("demo", device="cpu")


def test_server_answers_with_samples_and_their_spread_on_the_page_and_in_the_metrics(demo):
    shape = demo.model.config.chunk_shape
    noise = np.random.default_rng(3).standard_normal((3, *shape), np.float32)
    request = demo.example_observation()
    settings = ServeSettings(port=0, num_steps=2, num_samples=3, pick="velocity_residual", max_batch=2)
    with one_thread(), running_server({"p": lambda: demo}, settings) as (url, _), clients(url, 2) as [client, other]:
        answer = client.ask({**request, "torchpi/noise": noise})
        expected = demo.infer(request, noise=noise, num_steps=2, num_samples=3, pick="velocity_residual")
        assert set(answer) == {*expected, "server_timing"}
        for name in ("actions", "samples", "action_std", "velocity_residuals", "uncertainty", "sample_index"):
            np.testing.assert_allclose(answer[name], expected[name], atol=1e-5)
        assert np.array_equal(answer["actions"], answer["samples"][answer["sample_index"]])
        # Without torchpi/noise, the first sample equals the answer of a server without samples.
        first = other.ask(request)["samples"][0]
        page = json.loads(http(url, "/dashboard.json")[1])["robots"][0]["answered"]
        assert (page["num_samples"], page["uncertainty"]) == (3, float(f"{expected['uncertainty']:.4g}"))
        dimensions = json.loads(http(url, "/chunk/0.json")[1])["dimensions"]
        np.testing.assert_allclose([each["std"] for each in dimensions], answer["action_std"].T, rtol=1e-3, atol=1e-6)
        metrics = http(url, "/metrics")[1]
        assert 'torchpi_uncertainty_count{policy="p"} 2.0' in metrics
        for wrong, text in (
            ({"torchpi/noise": noise[0]}, rf"expected floating-point numbers [3, {shape[0]}, {shape[1]}]"),
            ({"torchpi/num_steps": 1}, "with one Euler step every path is straight"),
        ):
            refused = client.ask({**request, **wrong})
            error = json.loads(refused)
            assert error["code"] == "bad_observation"
            assert text in error["message"]
    settings = ServeSettings(port=0, num_steps=2)
    with one_thread(), running_server({"p": lambda: demo}, settings) as (url, _), clients(url, 2) as [_, other]:
        plain = other.ask(request)
    assert set(plain) == {"actions", "policy_timing", "server_timing"}
    np.testing.assert_allclose(plain["actions"], first, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected a positive whole number"),
        ({"pick": "first"}, "pick chooses among several samples"),
        ({"num_samples": 2, "num_steps": 1, "pick": "velocity_residual"}, "every path is straight"),
    ],
)
def test_meaningless_sample_settings_are_refused_at_the_start(wrong, message):
    with pytest.raises(ValueError, match=message):
        ServeSettings(**wrong)


def test_control_loop_holds_the_robot_of_an_uncertain_policy(demo):
    class Still:
        commands = observed = 0

        def observe(self):
            self.observed += 1
            if self.observed == 4:  # after the warm-up, two chunks have been refused
                loop.stop()
            return demo.example_observation()

        def act(self, action):
            self.commands += 1

    settings, robot = ServeSettings(port=0, num_steps=2, num_samples=2), Still()
    limit = ControlSettings(max_uncertainty=1e-6, control_hz=100.0, resample="as_is")
    with one_thread(), running_server({"p": lambda: demo}, settings) as (url, _), WebsocketPolicy(url) as policy:
        loop = ControlLoop(robot, policy, limit)
        report = loop.run(seconds=60)
    assert report.uncertain_chunks == 2
    assert (report.actions, robot.commands) == (0, 0)
