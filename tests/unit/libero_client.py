"""LIBERO driven as by openpi's client, with its observations, implemented independently; run as a program.

    python libero_client.py SUITE TASK EPISODE ACTIONS.npy OUT.npz

It runs in its own process, because robosuite expects to be the only renderer.
"""

import math
import os
import pathlib
import sys

import numpy as np


def axis_angle(quaternion):
    """Axis angle from acos(w), which exceeds π for negative w."""
    x, y, z, w = map(float, quaternion)
    w = max(-1.0, min(1.0, w))
    angle, sine = 2 * math.acos(w), math.sqrt(1 - w**2)
    return [0.0, 0.0, 0.0] if sine == 0 else [value * angle / sine for value in (x, y, z)]


def observation(raw):
    from openpi_client.image_tools import resize_with_pad

    state = [*raw["robot0_eef_pos"], *axis_angle(raw["robot0_eef_quat"]), *raw["robot0_gripper_qpos"]]
    images = {"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}
    return {
        **{f"observation/{key}": resize_with_pad(np.rot90(raw[name], 2), 224, 224) for key, name in images.items()},
        "observation/state": np.array(state),
        "quaternion": raw["robot0_eef_quat"],
    }


def assert_observes(environment, actions, expected):
    """Check an environment that was just reset: its observations equal the client's, before and after each action."""
    for step in range(len(actions) + 1):
        actual = environment.observe()
        assert actual.pop("prompt") == environment.instruction
        for key, value in actual.items():
            np.testing.assert_allclose(value, expected[key][step], rtol=0, atol=1e-12, err_msg=key)
        if step < len(actions):
            assert environment.step(actions[step]) == expected["done"][step]


def main(suite, task, episode, actions, out):
    os.environ |= {"LIBERO_CONFIG_PATH": os.devnull, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    tasks = benchmark.get_benchmark_dict()[suite]()
    file = pathlib.Path(get_libero_path("bddl_files")) / suite / tasks.get_task(int(task)).bddl_file
    env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=256, camera_widths=256)
    env.seed(7)
    for _ in range(int(episode) + 1):
        env.reset()
    env.set_init_state(tasks.get_task_init_states(int(task))[int(episode)])
    for _ in range(10):
        raw, _, _, _ = env.step([0, 0, 0, 0, 0, 0, -1])
    observations, done = [observation(raw)], []
    for action in np.load(actions):
        raw, _, success, _ = env.step(action.tolist())
        observations.append(observation(raw))
        done.append(success)
    arrays = {key: np.stack([each[key] for each in observations]) for key in observations[0]}
    np.savez(out, **arrays, done=done, prompt=tasks.get_task(int(task)).language)


if __name__ == "__main__":
    main(*sys.argv[1:])
