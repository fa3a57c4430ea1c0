"""π₀.₅ on LIBERO, with the hyperparameters of openpi's config `pi05_libero`.

    python recipes/libero.py --dataset DATASET --out run
    torchrun --nproc-per-node 8 recipes/libero.py --dataset DATASET --out run --parallel fsdp

DATASET is in LeRobot's format, with cameras whose names end in `image` and `wrist_image`, observation.state [8] and
action [7]. As in the published pi05_libero, the actions are LIBERO's own increments, and the prompt does not contain
the state (discrete_state_input is false). For openpi's dataset physical-intelligence/libero add
    --rename state=observation.state actions=action

Differences from the config: 2 % of the episodes are held out (disable with --holdout 0), and activation checkpointing
is on (--activation-checkpointing), which does not change the numbers.

For LoRA, with the hyperparameters of `pi0_libero_low_mem_finetune` (which trains π₀):
    --finetune lora --ema-decay 0 --batch-size 32 --lr-schedule cosine --lr 2.5e-5 --warmup-steps 1000
"""

from torchpi.cli import train_recipe
from torchpi.training.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig

RECIPE = TrainConfig(
    num_steps=30_000,
    batch_size=256,
    data=DataConfig(embodiment="pi05_libero"),
    model=ModelConfig(
        init="gs://openpi-assets/checkpoints/pi05_base", config="pi05_libero", activation_checkpointing="full"
    ),
    optim=OptimConfig(lr=5e-5, lr_schedule="constant", warmup_steps=10_000, ema_decay=0.999),
    checkpoint=CheckpointConfig(keep_every=5000),
)

if __name__ == "__main__":
    train_recipe(RECIPE)
