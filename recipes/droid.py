"""π₀.₅ on DROID, with the hyper-parameters of openpi's config `pi05_full_droid_finetune`.

    torchrun --nproc-per-node 8 recipes/droid.py --dataset DATASET --out run --parallel fsdp

DATASET: LeRobot's format, cameras whose names end in `exterior_image_1_left` and `wrist_image_left`, observation.state
[8] (seven joints and the gripper), action [8] (velocities of the joints, position of the gripper) at 15 Hz. Frames at
which the robot rests are left out, and the statistics are pi05_base's for DROID. For a set of openpi's converter, whose
state is in two columns: --rename joint_position+gripper_position=observation.state actions=action

For little data of your own, begin with the published policy and its statistics, as the config `pi05_droid_finetune`:
    --init gs://openpi-assets/checkpoints/pi05_droid --batch-size 32 --num-steps 20000 --lr-schedule cosine
    --lr 2.5e-5 --decay-steps 30000

Differences from the config: that one trains joint positions relative to the state, because simulators can execute
them; here actions are velocities, as those of the published pi05_droid, and its horizon of 15 is taken instead of 16.
Idle frames are found by the rule of `torchpi stats`, not by the config's list of frames. 2 % of the episodes are held
out (--holdout 0: none), and activations are recomputed (--activation-checkpointing), which changes no number.
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
