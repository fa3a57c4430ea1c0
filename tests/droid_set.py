"""A dataset in the layout of openpi's converter for DROID, examples/droid/convert_droid_data_to_lerobot.py."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchpi.data import LeRobotWriter

CAMERAS = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
RENAME = ("joint_position+gripper_position=observation.state", "actions=action")


def write_droid_set(path: pathlib.Path, *, episodes: int = 3, length: int = 20, gripper: str = "number") -> np.ndarray:
    """Write it, and return the states [F, 8].

    Args:
        gripper: "number" (as LeRobot stores the shape [1]), or "list": of one number.
    """
    rng = np.random.default_rng(0)
    states = rng.normal(size=(episodes, length, 8)).astype(np.float32)
    low, high = [-1] * 7 + [0], [1] * 8  # the robot's velocities and gripper
    with LeRobotWriter(
        path, fps=15, cameras=dict.fromkeys(CAMERAS, (18, 32, 3)), state_names=list("abcdefgh"),
        action_names=list("abcdefgh"), robot_type="panda",
    ) as writer:  # fmt: skip
        for episode in states:
            for state in episode:
                images = {f"observation.images.{name}": rng.integers(0, 256, (18, 32, 3), np.uint8) for name in CAMERAS}
                writer.add_frame({**images, "observation.state": state, "action": rng.uniform(low, high)})
            writer.save_episode("put the marker into the cup")
    for file in path.glob("data/*/*.parquet"):
        pq.write_table(_in_parts(pq.read_table(file), gripper), file)
    info = json.loads((path / "meta/info.json").read_text())
    features = {name.removeprefix("observation.images."): feature for name, feature in info["features"].items()}
    del features["observation.state"], features["action"]
    for name, dims in (("joint_position", 7), ("gripper_position", 1), ("actions", 8)):
        features[name] = {"dtype": "float32", "shape": [dims], "names": [name]}
    (path / "meta/info.json").write_text(json.dumps({**info, "features": features}))
    return states.reshape(-1, 8)


def _in_parts(table: pa.Table, gripper: str) -> pa.Table:
    columns = {name.removeprefix("observation.images."): table.column(name) for name in table.column_names}
    state = np.stack(columns.pop("observation.state").to_numpy())
    columns["actions"] = columns.pop("action")
    columns["joint_position"] = pa.FixedSizeListArray.from_arrays(state[:, :7].ravel(), 7)
    numbers = pa.array(state[:, 7])
    columns["gripper_position"] = numbers if gripper == "number" else pa.FixedSizeListArray.from_arrays(numbers, 1)
    return pa.table(columns)
