"""Helpers of the simulators' tests."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig, sim
from torchpi.robots import metaworld
from torchpi.sim.environment import UnstableError
from torchpi.transforms import Normalization, NormStats

ROOT = pathlib.Path(__file__).parents[2]
HORIZON = 16


@functools.cache
def _opengl_error() -> str:
    """Reason why nothing can be rendered; tried in another process, because MuJoCo chooses its backend only once."""
    program = "from torchpi.sim import make_environment as m; e = m('metaworld', 'reach'); e.reset(0); e.observe()"
    done = python("-c", program)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def require_simulator(package: str = "metaworld") -> None:
    """Skip where there is no simulator, or no OpenGL that renders without a screen."""
    pytest.importorskip(package, exc_type=ImportError)
    if error := _opengl_error():
        pytest.skip(error)


def random_policy(embodiment: Embodiment | None = None, **config) -> Policy:
    """A tiny π₀.₅ with random weights, large enough that its actions depend on images and prompt."""
    sizes = {"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    embodiment = embodiment or metaworld()
    defaults = {
        "pi05": True,
        "paligemma_variant": GemmaConfig(width=16, mlp_dim=32, **sizes),
        "action_expert_variant": GemmaConfig(width=16, mlp_dim=32, **sizes),
        "siglip_variant": VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=24),
        "action_dim": max(embodiment.action_size, len(embodiment.state_names)),
        "action_horizon": HORIZON,
        "vocab_size": 1024,
        "image_size": 96,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchpi.Pi0(Pi0Config(**defaults | config))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    stats = {
        "state": _unit_stats(len(embodiment.state_names)),
        "actions": _unit_stats(embodiment.action_size),
    }
    return Policy(
        model.eval(),
        embodiment,
        norm_stats=stats,
        normalization={key: Normalization("quantile", "openpi") for key in stats},
        tokenizer=ROOT / "src" / "torchpi" / "assets" / "tiny_tokenizer.model",
        provenance={"tasks": ["faucet-open", "faucet-close"]},
    )


class Corridor:
    """A fake environment with Meta-World's robot: the hand must move a distance that depends on the seed."""

    def __init__(self, task="short", *, image_size=16, step_limit=40):
        self.task, self.instruction, self.embodiment = task, CORRIDORS[task], metaworld()
        self.max_steps, self.image_size = step_limit, image_size
        self.log = []

    def reset(self, seed):
        self.log.append(f"reset {seed}")
        self.goal, self.position = 5 + seed % 5, 0.0

    def observe(self):
        self.log.append("observe")
        image = np.full((self.image_size, self.image_size, 3), int(10 * self.position) % 200 + 20, np.uint8)
        state = np.array([self.position, self.goal, 0, 0]) / 10
        return {"base": image, "wrist": image // 2, "state": state, "prompt": self.instruction}

    def step(self, action):
        self.log.append("step")
        if action[3] > 0.9:
            raise UnstableError("the corridor has burst")
        self.position += float(np.clip(action[0], -1, 1))
        return self.position >= self.goal

    def expert_action(self):
        return np.array([1, 0, 0, -1], np.float32)

    def render(self, size):
        self.log.append("render")
        return {name: np.full((size, size, 3), 90, np.uint8) for name in ("base", "wrist")}

    def close(self):
        self.log.append("close")


CORRIDORS = {"short": "go a short way", "long": "go a long way"}


@pytest.fixture
def corridor(monkeypatch):
    """Register `Corridor` as the environment "corridor"; the fixture is the list of instances."""
    made = []

    def make(task, *, image_size):
        made.append(Corridor(task, image_size=image_size))
        return made[-1]

    description = sim.Simulator(CORRIDORS, metaworld(), 40, 16, make, expert_tasks=tuple(CORRIDORS), package="numpy")
    monkeypatch.setitem(sim._SIMULATORS, "corridor", description)
    return made


def _unit_stats(size: int) -> NormStats:
    return NormStats(np.zeros(size), np.ones(size), -np.ones(size), np.ones(size))


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another process, with torchpi and the tests' modules on its path."""
    paths = f"{ROOT / 'src'}{os.pathsep}{pathlib.Path(__file__).parent}"
    command = [sys.executable, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
