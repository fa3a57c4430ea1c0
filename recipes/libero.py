"""π₀.₅ on LIBERO, with the hyper-parameters of openpi's config `pi05_libero`.

    python recipes/libero.py --dataset DATASET --out run
    torchrun --nproc-per-node 8 recipes/libero.py --dataset DATASET --out run --parallel fsdp

DATASET: LeRobot's format, cameras whose names end in `image` and `wrist_image`, observation.state [8], action [7]. The
actions are LIBERO's own increments, and the state is in no prompt (discrete_state_input is false), as in the published
pi05_libero. For openpi's own set, physical-intelligence/libero: --rename state=observation.state actions=action

Differences from the config: 2 % of the episodes are held out (--holdout 0: none), and activations are recomputed
(--activation-checkpointing), which changes no number.

Its LoRA variant has the flags of `pi0_libero_low_mem_finetune` (that one trains π₀):
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
