"""π₀.₅ on DROID, with the hyperparameters of openpi's config `pi05_full_droid_finetune`.

    torchrun --nproc-per-node 8 recipes/droid.py --dataset DATASET --out run --parallel fsdp

DATASET is in LeRobot's format, at 15 Hz, with cameras whose names end in `exterior_image_1_left` and
`wrist_image_left`, observation.state [8] (seven joints and the gripper) and action [8] (joint velocities, gripper
position). Frames in which the robot is idle are skipped. The statistics are those of pi05_base for DROID. For a dataset
made by openpi's converter, whose state has two columns, add
    --rename joint_position+gripper_position=observation.state actions=action

For a small dataset of your own, start from the published policy and its statistics, like the config
`pi05_droid_finetune`:
    --init gs://openpi-assets/checkpoints/pi05_droid --batch-size 32 --num-steps 20000 --lr-schedule cosine
    --lr 2.5e-5 --decay-steps 30000

Differences from the config: it trains joint positions relative to the state, because simulators can execute them; here
actions are velocities, and the horizon is 15 instead of 16, as in the published pi05_droid. Idle frames are detected as
in `torchpi stats` instead of taken from the config's list. 2 % of the episodes are held out (disable with --holdout 0),
and activation checkpointing is on (--activation-checkpointing), which does not change the numbers.
"""

from torchpi.cli import train_recipe
from torchpi.training.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig

RECIPE = TrainConfig(
    num_steps=100_000,
    batch_size=256,
    data=DataConfig(embodiment="pi05_droid", norm_stats="init:droid", skip_idle=True),
    model=ModelConfig(
        init="gs://openpi-assets/checkpoints/pi05_base", config="pi05_droid", activation_checkpointing="full"
    ),
    optim=OptimConfig(lr=5e-5, lr_schedule="constant", warmup_steps=1000, ema_decay=0.99),
    checkpoint=CheckpointConfig(save_every=5000, keep_every=10_000),
)

if __name__ == "__main__":
    train_recipe(RECIPE)
