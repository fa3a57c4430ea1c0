"""Time and peak memory of loading, converting, planning and building a training from a full-size checkpoint.

    python benchmarks/full_size.py FOLDER [--config pi05] [--finetune lora]

If FOLDER has no checkpoint, one is written: random numbers in bfloat16 under openpi's PyTorch names (6.7 GB for pi05).
Each row runs in its own process, one after the other; at most one model is in memory, in bfloat16 or as for training.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Annotated

import psutil
import torch
import tyro

from torchpi.bench.load import measure
from torchpi.bench.model import bench_config
from torchpi.checkpoints import load_model
from torchpi.checkpoints.openpi_torch import torch_table
from torchpi.checkpoints.safetensors_files import has_weights, write_safetensors
from torchpi.config import Finetune
from torchpi.convert import convert
from torchpi.schema import write_json
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import process_group
from torchpi.training.loop import build_state
from torchpi.training.plan import plan
from torchpi.training.weights import build_model, model_config, open_init, with_dtype

SIZES = "model.json"


@dataclasses.dataclass(frozen=True)
class FullSize:
    """Checkpoint of random numbers."""

    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    """Folder of the checkpoint, which is created if missing."""
    config: str = "pi05"
    """Preset, or mid (47 M parameters)."""
    finetune: Finetune = "lora"
    """Trained weights of the planned and built training."""

    def run(self) -> None:
        """Measure all operations and print a table."""
        config = bench_config(self.config)
        if not has_weights(self.folder):
            self.write()
        size = 2 * sum(torch.Size(array.shape).numel() for array in torch_table(config).values())
        free = psutil.virtual_memory().available
        if free < 2.5 * size:
            raise SystemExit(f"{free / 1e9:.1f} GB of memory are available; expected {2.5 * size / 1e9:.1f} GB.")
        print("| | seconds | CPU | own peak, GB | with mapped files, GB | model, GB |")
        print("| --- | --- | --- | --- | --- | --- |")
        steps: tuple[tuple[str, Callable[..., int]], ...] = (
            ("load", load), (f"plan {self.finetune}", plan_training), (f"build {self.finetune}", build_training),
            ("convert to openpi-jax", convert_to_jax),
        )  # fmt: skip
        for name, work in steps:
            found = measure(work, self.folder, self.finetune)
            sizes = (found[key] / 1e9 for key in ("peak_anonymous", "peak_rss", "model_bytes"))
            print(
                f"| {name} | {found['seconds']:.1f} | {found['cpu']:.1f} | {' | '.join(f'{x:.2f}' for x in sizes)} |",
                flush=True,
            )

    def write(self) -> None:
        """Write the checkpoint, filling every array from the same 16 M normal numbers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = bench_config(self.config)
        shapes = {name: array.shape for name, array in torch_table(config).items()}
        block = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).bfloat16()

        def read(name: str) -> torch.Tensor:
            count = torch.Size(shapes[name]).numel()
            return block.repeat(-(-count // len(block)))[:count].view(shapes[name])

        write_json(self.folder / SIZES, config.to_dict())
        write_safetensors(self.folder, shapes, read, dtype=torch.bfloat16)


def recipe(folder: pathlib.Path, finetune: Finetune) -> TrainConfig:
    """Training recipe for the checkpoint."""
    config = TrainConfig(
        init=str(folder), model=str(folder / SIZES), finetune=finetune, embodiment="aloha", device="cpu", ema_decay=0.0
    )
    return with_dtype(config, torch.device("cpu"))


def load(folder: pathlib.Path, finetune: Finetune) -> int:
    """Load the model in bfloat16, read every byte, and return their number."""
    model = load_model(folder, config=folder / SIZES, dtype=torch.bfloat16)
    return sum(p.nbytes for p in model.parameters() if p.view(-1).max() is not None)


def convert_to_jax(folder: pathlib.Path, finetune: Finetune) -> int:
    """Convert without checking the result, and return the bytes of the arrays."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".torchpi_full_size_") as scratch:
        report = convert(folder, pathlib.Path(scratch) / "jax", "openpi-jax", config=folder / SIZES, check=False)
    return 2 * report.num_parameters


def plan_training(folder: pathlib.Path, finetune: Finetune) -> int:
    """Plan a training that does not fit, so that all alternatives are planned; return the bytes of its weights."""
    return plan(recipe(folder, finetune), world_size=1, local_world_size=1, device_memory=10**9).peak.weights


def build_training(folder: pathlib.Path, finetune: Finetune) -> int:
    """Build a training, and return the bytes of its weights."""
    config = recipe(folder, finetune)
    with process_group("cpu") as world:
        init = open_init(config)
        model, _ = build_model(config, model_config(config, init), init, skeleton=False)
        build_state(model, config, world)
        return sum(p.nbytes for p in model.parameters())


if __name__ == "__main__":
    tyro.cli(FullSize).run()
