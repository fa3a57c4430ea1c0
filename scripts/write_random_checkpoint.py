"""Write an openpi JAX checkpoint of random float32 weights, to measure loading.

    python scripts/write_random_checkpoint.py OUT [pi05]
    torchpi bench load --policy OUT --dtype bfloat16

By default 595 M parameters (2.4 GB) in the proportions of the full-size model: the largest array is a third of it. A
preset's name selects its sizes: pi05 has 3.35 G parameters (13.4 GB; takes 16 GB of memory). Each array is one zstd
chunk, as orbax writes it.
"""

import sys
from pathlib import Path

import torch

from torchpi.checkpoints.openpi import write_params
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig, preset

SMALLER = Pi0Config(
    pi05=True,
    paligemma_variant=GemmaConfig(width=1024, depth=12, mlp_dim=8192, num_heads=8, num_kv_heads=1, head_dim=128),
    action_expert_variant=GemmaConfig(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
    siglip_variant=VisionConfig(width=768, depth=8, mlp_dim=3072, num_heads=12),
    vocab_size=131_072,
)


def write(out: Path, config: Pi0Config) -> None:
    params = out / "params"
    params.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    shapes = {name: array.shape for name, array in jax_table(config).items()}
    write_params(params, shapes, lambda name: torch.randn(shapes[name], generator=rng), dtype=torch.float32)


if __name__ == "__main__":
    write(Path(sys.argv[1]), preset(sys.argv[2]) if len(sys.argv) > 2 else SMALLER)
