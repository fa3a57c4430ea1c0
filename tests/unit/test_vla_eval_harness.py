"""The vla-evaluation-harness' own client and runner against `torchpi serve --protocol vla-eval`."""

import contextlib
import json
import logging
import subprocess
import sys
import types

import anyio
import numpy as np
import pytest
from serving_helpers import SECONDS
from sim_helpers import random_policy
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.connection import Connection
from vla_eval.orchestrator import Orchestrator

from torchpi.robots import get_embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings

LIBERO = "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark"


class Reaching(StepBenchmark):
    """LIBERO's observations and specs without its simulator; succeeds after three actions of seven numbers."""

    made: "list[Reaching]" = []  # noqa: RUF012

    def __init__(self, send_wrist_image: bool = False, send_state: bool = False, quat_no_antipodal: bool = False):
        super().__init__()
        self.libero = LIBEROBenchmark(
            send_wrist_image=send_wrist_image, send_state=send_state, quat_no_antipodal=quat_no_antipodal
        )
        controller = types.SimpleNamespace(ee_pos=np.zeros(3), ee_ori_mat=np.eye(3))
        self.libero._env = types.SimpleNamespace(robots=[types.SimpleNamespace(controller=controller)])
        self.params = send_wrist_image, send_state, quat_no_antipodal
        self.actions: list[np.ndarray] = []
        self.get_action_spec, self.get_observation_spec = self.libero.get_action_spec, self.libero.get_observation_spec
        self.made.append(self)

    def get_tasks(self):
        return [{"name": "reach"}]

    def reset(self, task):
        self.actions = []
        rng = np.random.default_rng(0)
        images = ("agentview_image", "robot0_eye_in_hand_image")
        return {
            **{name: rng.integers(0, 256, (256, 256, 3), np.uint8) for name in images},
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([0.6, 0.0, 0.0, -0.8]),
            "robot0_gripper_qpos": np.array([0.01, -0.02]),
        }

    def make_obs(self, raw_obs, task):
        return self.libero.make_obs(raw_obs, task)

    def step(self, action):
        self.actions.append(np.asarray(action["actions"]))
        return StepResult(self._last_result.obs, 0.0, len(self.actions) == 3, {})

    def get_step_result(self, step_result):
        return {"success": step_result.done}


@pytest.fixture(scope="module")
def policy():
    return random_policy(get_embodiment("libero"))


@contextlib.contextmanager
def served(policy):
    """Address of a ready server."""
    with running_server({"it": lambda: policy}, ServeSettings(port=0, protocol="vla-eval")) as (url, server):
        server.scheduler.ready.result(SECONDS)
        yield url


def test_harness_runs_a_policy_and_accepts_its_specs(policy, caplog):
    seen = []
    infer = policy.infer_batch

    def watch(observations, **options):
        seen.extend(observations)
        return infer(observations, **options)

    config = {
        "benchmarks": [{"benchmark": f"{__name__}:Reaching", "episodes_per_task": 2, "max_steps": 5}],
    }
    with pytest.MonkeyPatch.context() as patch, served(policy) as url:
        patch.setattr(policy, "infer_batch", watch)
        with caplog.at_level(logging.INFO, "vla_eval"):
            (result,) = anyio.run(Orchestrator({**config, "server": {"url": url}}, no_save=True).run)
    assert result["mean_success"] == 1.0
    assert "Spec validation passed" in caplog.text
    benchmark = Reaching.made[-1]
    assert benchmark.params == (True, True, False)  # quat_no_antipodal is only for names with LIBERO
    assert [action.shape for action in benchmark.actions] == [(7,)] * 3
    assert seen[-1]["prompt"] == "reach"
    np.testing.assert_array_equal(
        seen[-1]["observation/image"], benchmark._last_result.obs["agentview_image"][::-1, ::-1]
    )


def test_liberos_benchmark_keeps_the_quaternions_sign_for_policies(policy):
    async def hello(url):
        connection = Connection(url, timeout=SECONDS)
        await connection.connect(benchmark=LIBERO)
        params = connection.server_info["observation_params"]
        benchmark = Reaching(**params)
        action = await connection.act(benchmark.make_obs(benchmark.reset({}), {"name": "x"}))
        with pytest.raises(RuntimeError, match=r"bad_observation: The observation lacks images.wrist, states; found"):
            await connection.act(Reaching().make_obs(benchmark.reset({}), {"name": "x"}))
        await connection.close()
        return benchmark, action

    with served(policy) as url:
        benchmark, action = anyio.run(hello, url)
    assert benchmark.params == (True, True, True)
    state = benchmark.make_obs(benchmark.reset({}), {"name": "x"})["states"]
    angle = 2 * np.arccos(-0.8)  # beyond π, as in robosuite and openpi's client
    np.testing.assert_allclose(state[3:6], [angle, 0, 0], atol=1e-6)
    assert action["actions"].shape == (7,)


@pytest.mark.slow
def test_liberos_own_benchmark_runs_an_episode(policy, tmp_path):
    pytest.importorskip("libero", reason="LIBERO is an extra: pip install 'torchpi[libero]'")
    entry = {"benchmark": LIBERO, "max_tasks": 1, "max_steps": 3, "params": {"suite": "libero_object", "seed": 7}}
    (tmp_path / "libero.yaml").write_text(json.dumps({"output_dir": str(tmp_path), "benchmarks": [entry]}))
    arguments = ["run", "-c", str(tmp_path / "libero.yaml"), "--no-docker", "--no-save"]
    with served(policy) as url:
        command = [sys.executable, "-m", "vla_eval.cli.main", *arguments, "--server-url", url]
        done = subprocess.run(command, capture_output=True, text=True, input="", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Spec validation passed" in done.stderr
    assert "FAIL (steps=3)" in done.stderr
