"""robosuite driven as by its own programs, with the observations of openpi's client for LIBERO; run as a program.

    python robosuite_client.py TASK SEED ACTIONS.npy OUT.npz

It runs in its own process, because robosuite expects to be the only renderer.
"""

import os
import sys

import numpy as np
from libero_client import observation


def main(task, seed, actions, out):
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl")
    import robosuite
    from robosuite.controllers import load_controller_config

    env = robosuite.make(
        task,
        robots="Panda",
        controller_configs=load_controller_config(default_controller="OSC_POSE"),
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names=["agentview", "robot0_eye_in_hand"],
        camera_heights=256,
        camera_widths=256,
    )
    np.random.seed(int(seed))  # noqa: NPY002
    observations, done = [observation(env.reset())], []
    for action in np.load(actions):
        observations.append(observation(env.step(action)[0]))
        done.append(env._check_success())
    np.savez(out, **{key: np.stack([each[key] for each in observations]) for key in observations[0]}, done=done)


if __name__ == "__main__":
    main(*sys.argv[1:])
