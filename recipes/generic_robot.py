"""π₀.₅ with LoRA on your own robot, with the hyperparameters of openpi's config `pi0_libero_low_mem_finetune`.

    python recipes/generic_robot.py --dataset DATASET --embodiment my_arm.json --out run

DATASET is in LeRobot's format. my_arm.json describes the robot's cameras, state and actions; docs/fine_tune.md shows
one, and how to choose the statistics (--norm-stats). Copy this file to write your own recipe.

To train all weights instead, like the config `pi05_aloha_pen_uncap`:
    --finetune full --ema-decay 0.99 --batch-size 64 --num-steps 20000

Differences from the config: π₀.₅ instead of π₀, 2 % of the episodes are held out (disable with --holdout 0), and
activation checkpointing is on (--activation-checkpointing), which does not change the numbers.
"""

from torchpi.cli import train_recipe
from torchpi.training.config import CheckpointConfig, ModelConfig, OptimConfig, TrainConfig

RECIPE = TrainConfig(
    num_steps=30_000,
    batch_size=32,
    model=ModelConfig(
        init="gs://openpi-assets/checkpoints/pi05_base", finetune="lora", activation_checkpointing="full"
    ),
    optim=OptimConfig(lr=2.5e-5, warmup_steps=1000, decay_steps=30_000, min_lr=2.5e-6, ema_decay=0.0),
    checkpoint=CheckpointConfig(keep_every=5000),
)

if __name__ == "__main__":
    train_recipe(RECIPE)
