"""Render the packaged camera frames: the first observation of an episode of each of the embedded policy's tasks.

`torchpi demo` passes them to the policy if rendering is not possible, and `torchpi trace demo` uses them as inputs.
Each is the first observation of the demo's first episode. Writes an image per task and camera and moments.json into
src/torchpi/assets/demo, which is emptied first:

    .venv/bin/python scripts/render_demo_frames.py
"""

import importlib.metadata
import json

from PIL import Image

from torchpi.assets import assets
from torchpi.policy import load_policy
from torchpi.sim import make_environment
from torchpi.sim.environment import environment_seed
from torchpi.sim.rollout import camera_keys

OUT = assets() / "demo"
ENV, SEED, EPISODE = "metaworld", 0, 0


def render(task: str) -> dict:
    """Write the task's images, and return the rest of the observation."""
    environment = make_environment(ENV, task)
    environment.reset(environment_seed("eval", SEED, task, EPISODE))
    observation = environment.observe()
    images = {camera: f"{task}_{camera}.png" for camera in camera_keys(environment.embodiment)}
    for camera, name in images.items():
        Image.fromarray(observation[camera]).save(OUT / name, optimize=True)
    environment.close()
    return {"prompt": observation["prompt"], "state": observation["state"].round(6).tolist(), "images": images}


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.iterdir():
        old.unlink()
    versions = {package: importlib.metadata.version(package) for package in ("metaworld", "mujoco")}
    document = {
        "tasks": {task: render(task) for task in load_policy("demo", device="cpu").provenance["tasks"]},
        "source": f"Meta-World {versions['metaworld']}, evaluation seed {SEED}, episode {EPISODE}, before the first "
        f"action; rendered with MuJoCo {versions['mujoco']} by scripts/render_demo_frames.py",
        "licence": "Meta-World, its models and textures: MIT; MuJoCo: Apache-2.0",
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (OUT / "moments.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
