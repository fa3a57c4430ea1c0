"""Render the observation that `torchpi demo` shows: a moment of Meta-World's drawer-open, seen by three cameras.

Writes base.png, left.png, wrist.png, observation.json and norm_stats.json into src/torchpi/assets/demo. The simulator
is no dependency of torchpi; make an environment for it (and, on a machine without a display, have EGL: Debian's
libegl1 and libgl1-mesa-dri):

    python3 -m venv /tmp/metaworld
    /tmp/metaworld/bin/pip install mujoco==3.3.0 metaworld==3.1.1 packaging pillow
    MUJOCO_GL=egl /tmp/metaworld/bin/python scripts/render_demo_frames.py
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mujoco
import numpy as np
from metaworld import policies
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
from PIL import Image

OUT = Path(__file__).parents[1] / "src" / "torchpi" / "assets" / "demo"
WIDTH, HEIGHT = 320, 240
TASK, SEED, STEP = "drawer-open", 0, 44  # the moment that is shown: the gripper reaches for the handle
NUM_EPISODES = 10  # for the statistics, of each of these tasks: in drawer-open alone the gripper does not move
STATISTICS_TASKS = {
    "drawer-open": policies.SawyerDrawerOpenV3Policy,
    "drawer-close": policies.SawyerDrawerCloseV3Policy,
    "pick-place": policies.SawyerPickPlaceV3Policy,
}


def free_camera(azimuth: float, elevation: float, distance: float) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.lookat[:] = 0.0, 0.66, 0.1
    camera.azimuth, camera.elevation, camera.distance = azimuth, elevation, distance
    return camera


CAMERAS = {
    "base": free_camera(azimuth=145, elevation=-35, distance=1.05),
    "left": free_camera(azimuth=35, elevation=-30, distance=1.05),
    "wrist": "gripperPOV",
}


def make_env(task: str):
    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=SEED)
    env.seeded_rand_vec, env._freeze_rand_vec = True, False  # without these the seed changes nothing
    env.model.site_rgba[:, 3] = 0  # hide the goal markers: a real camera would not see them
    return env


def expert_episode(env, expert, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each step's robot state (hand x, y, z in metres; gripper opening) and expert action, until the task is done."""
    env.seed(seed)
    observation, _ = env.reset()
    success = False
    while not success:
        action = np.clip(expert.get_action(observation), -1, 1).astype(np.float64)
        yield observation[:4], action
        observation, _, _, _, info = env.step(action)
        success = bool(info["success"])


def statistics(rows: list[np.ndarray]) -> dict[str, list[float]]:
    values = np.stack(rows)
    moments = {
        "mean": values.mean(0),
        "std": values.std(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    return {name: value.round(6).tolist() for name, value in moments.items()}


def write_json(path: Path, value: dict) -> None:
    path.write_text(re.sub(r"\[\s+([^][{}]*?)\s+\]", _one_line, json.dumps(value, indent=2)) + "\n")


def _one_line(array: re.Match) -> str:
    return "[" + " ".join(array[1].split()) + "]"


def render_observation() -> None:
    env = make_env(TASK)
    renderer = mujoco.Renderer(env.model, height=HEIGHT, width=WIDTH)
    state, _ = next(islice(expert_episode(env, STATISTICS_TASKS[TASK](), SEED), STEP, None))
    for name, camera in CAMERAS.items():
        renderer.update_scene(env.data, camera=camera)
        Image.fromarray(renderer.render()).save(OUT / f"{name}.png", optimize=True)
    renderer.close()
    observation = {
        "prompt": "open the drawer",
        "state": state.round(6).tolist(),
        "state_names": ["hand_x", "hand_y", "hand_z", "gripper"],
        "images": {name: f"{name}.png" for name in CAMERAS},
        "source": f"Meta-World 3.1.1 {TASK}-v3, scripted expert, seed {SEED}, step {STEP}; "
        "rendered with MuJoCo 3.3.0 by scripts/render_demo_frames.py",
        "licence": "Meta-World, its models and textures: MIT; MuJoCo: Apache-2.0",
    }
    write_json(OUT / "observation.json", observation)


def measure_statistics() -> None:
    states, actions = [], []
    for task, expert in STATISTICS_TASKS.items():
        env = make_env(task)
        for seed in range(SEED, SEED + NUM_EPISODES):
            for state, action in expert_episode(env, expert(), seed):
                states.append(state)
                actions.append(action)
    write_json(OUT / "norm_stats.json", {"norm_stats": {"state": statistics(states), "actions": statistics(actions)}})
    print(f"{len(states)} steps of {', '.join(STATISTICS_TASKS)}")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    render_observation()
    measure_statistics()
