"""Write an openpi JAX checkpoint of random float32 weights, to measure how one is loaded.

    python scripts/write_random_checkpoint.py OUT [pi05]
    torchpi bench load --policy OUT --dtype bfloat16

By default 595 M parameters (2.4 GB) in the proportions of the full-size model: the largest leaf is a third of it. With
the name of a preset its sizes: pi05 has 3.35 G parameters (13.4 GB; takes 16 GB of memory). Each leaf is one zstd
chunk, as orbax writes it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorstore

from torchpi.checkpoints.openpi_layout import jax_leaves
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
    rng = np.random.default_rng(0)
    tree = {}
    for name, leaf in jax_leaves(config).items():
        keys = ("params", *name.split("."))
        tree[str(keys)] = {"key_metadata": [{"key": key, "key_type": 2} for key in keys]}
        metadata = {"shape": leaf.shape, "chunks": leaf.shape, "dtype": "<f4", "compressor": {"id": "zstd", "level": 1}}
        base = {"driver": "file", "path": f"{params.resolve()}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        store = tensorstore.open(spec, create=True).result()
        store.write(rng.standard_normal(leaf.shape, dtype=np.float32)).result()
    (params / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_zarr3": False}))


if __name__ == "__main__":
    write(Path(sys.argv[1]), preset(sys.argv[2]) if len(sys.argv) > 2 else SMALLER)
