"""A small model and dataset for training tests, and access to a run's saved state."""

import json
import pathlib
from typing import Any

import numpy as np
import torch

from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.data import LeRobotWriter
from torchpi.training import state
from torchpi.training.config import TrainConfig

GEMMA = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
SIZES = Pi0Config(
    pi05=True,
    paligemma_variant=GEMMA,
    action_expert_variant=GEMMA,
    siglip_variant=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=16),
    action_dim=6,
    action_horizon=4,
    max_token_len=48,
    vocab_size=1024,
    image_size=32,
)
TASKS = ("open the drawer", "close the faucet")


def write_dataset(
    path: pathlib.Path, *, episodes: int = 4, cameras: tuple[str, ...] = ("base", "wrist"), video: bool = False
) -> None:
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        path,
        fps=80,
        cameras=dict.fromkeys(cameras, (32, 32, 3)),
        state_names=["hand_x", "hand_y", "hand_z", "gripper"],
        action_names=["delta_x", "delta_y", "delta_z", "gripper"],
        video=video,
    ) as writer:
        for episode in range(episodes):
            for _ in range(6):
                images = {f"observation.images.{name}": rng.integers(0, 256, (32, 32, 3), np.uint8) for name in cameras}
                writer.add_frame({**images, "observation.state": rng.normal(size=4), "action": rng.normal(size=4)})
            writer.save_episode(TASKS[episode % 2])


def small_recipe(dataset: pathlib.Path, sizes: Pi0Config = SIZES, **options: Any) -> TrainConfig:
    """A fast recipe for a dataset of `write_dataset`; the model's sizes are written to a file beside the dataset."""
    model = dataset.parent / "model.json"
    model.write_text(json.dumps(sizes.to_dict()))
    defaults = {"batch_size": 4, "lr": 1e-2, "ema_decay": 0.5, "dtype": "float32", "chunk_samples": 0}
    defaults |= {"trackers": (), "workers": 0}
    return TrainConfig(dataset=str(dataset), embodiment="metaworld", model=str(model), **defaults | options)


def weights(run: pathlib.Path) -> dict[str, torch.Tensor]:
    """The unsharded state of a run's last checkpoint."""
    arrays = state.StateArrays(state.checkpoints(run)[-1] / state.STATE)
    return {name: arrays.read(name) for name in arrays.names}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
