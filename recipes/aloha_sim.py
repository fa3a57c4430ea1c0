"""π₀ on ALOHA's simulator (transfer a cube), with the hyperparameters of openpi's config `pi0_aloha_sim`.

    python recipes/aloha_sim.py --dataset DATASET --out run
    torchpi eval run/checkpoints/00020000/policy --env aloha_sim --tasks transfer_cube

DATASET is in LeRobot's format, with a camera whose name ends in `cam_high`, observation.state [14] and action [14]
(absolute joint positions). The wrist cameras are optional; the simulator has none. For
lerobot/aloha_sim_transfer_cube_human, whose camera is `top`, add
    --rename observation.images.top=observation.images.cam_high

Differences from the config: 2 % of the episodes are held out (disable with --holdout 0), and activation checkpointing
is on (--activation-checkpointing), which does not change the numbers.
"""

from torchpi.cli import train_recipe
from torchpi.training.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig

RECIPE = TrainConfig(
    num_steps=20_000,
    batch_size=32,
    data=DataConfig(embodiment="pi0_aloha_sim", prompt="Transfer cube"),
    model=ModelConfig(
        init="gs://openpi-assets/checkpoints/pi0_base", config="pi0_aloha_sim", activation_checkpointing="full"
    ),
    optim=OptimConfig(lr=2.5e-5, warmup_steps=1000, decay_steps=30_000, min_lr=2.5e-6, ema_decay=0.99),
    checkpoint=CheckpointConfig(keep_every=5000),
)

if __name__ == "__main__":
    train_recipe(RECIPE)
