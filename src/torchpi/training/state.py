"""The training state (weights, their EMA and AdamW's moments), and reading it from a checkpoint.

RUN/checkpoints/STEP/state/*        the state, in one or more files per process; frozen weights are read from `init`
RUN/checkpoints/STEP/policy         a policy folder with the EMA weights
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from torchpi.errors import TrainingError
from torchpi.model.pi0 import Pi0
from torchpi.training.config import Optimizer
from torchpi.training.distributed import release_gathered
from torchpi.training.optim import make_optimizer

STATE, CHECKPOINTS = "state", "checkpoints"


@dataclasses.dataclass
class TrainState:
    """Weights, their EMA, the optimizer's moments, and the number of updates so far."""

    model: Pi0
    trainable: dict[str, nn.Parameter]
    """Trainable parameters by name. If they are sharded DTensors, so are gradients, moments and EMA."""
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    """EMA weights by name; empty if the run has none."""
    step: int = 0

    @classmethod
    def create(cls, model: Pi0, *, weight_decay: float, ema: bool, optimizer: Optimizer = "adamw") -> "TrainState":
        """Create the state before the first update; the EMA starts at the weights."""
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        ema_weights = {name: parameter.detach().clone() for name, parameter in trainable.items()} if ema else {}
        adamw = make_optimizer(trainable.values(), weight_decay=weight_decay, kind=optimizer)
        return cls(model, trainable, adamw, ema_weights)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[Pi0]:
        """Context in which the model has its EMA weights."""
        self._swap_ema()
        try:
            yield self.model
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        """Swap weights and EMA weights, one array at a time."""
        release_gathered(self.model)
        for name, ema in self.ema.items():
            weights = self.trainable[name]
            previous = weights.clone()
            weights.copy_(ema)
            ema.copy_(previous)

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors under flat names: "weights.NAME", "ema.NAME", "exp_avg.NAME" and so on."""
        named: dict[str, Tensor] = {f"weights.{name}": value.detach() for name, value in self.trainable.items()}
        named |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim and not key.startswith("qmap"):
                    named[f"{key}.{name}"] = value
        return named

    def load(self, folder: pathlib.Path, step: int) -> None:
        """Load the state of a checkpoint, written by any number of processes."""
        self._make_moments(step)
        own = self.tensors()
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            saved = {name: tuple(entry.size) for name, entry in _headers(reader).state_dict_metadata.items()}
            expected = {name: tuple(value.shape) for name, value in own.items()}
            if saved != expected:
                wrong = sorted(name for name in {*saved, *expected} if saved.get(name) != expected.get(name))
                raise TrainingError(f"It belongs to another model, recipe or optimizer: {', '.join(wrong[:6])} differ.")
            dcp.load(own, storage_reader=reader)
        except (OSError, ValueError, safetensors.SafetensorError, dcp.api.CheckpointException) as error:
            damaged = folder.parent
            older = [path for path in checkpoints(damaged.parent.parent) if int(path.name) < step]
            fallback = (
                f"continues from {older[-1]}" if older else "starts at the first step: there is no older checkpoint"
            )
            raise TrainingError(
                f"{folder} can't be loaded: {str(error).rstrip('.')}. Move the checkpoint {damaged} elsewhere or "
                f"delete it; --resume then {fallback}."
            ) from error
        self.step = step

    def _make_moments(self, step: int) -> None:
        """Create the optimizer's state, so that it can be loaded; the optimizer itself creates it in its first step."""
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes
            for group_index, group in enumerate(self.optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    self.optimizer.init_state(group, parameter, group_index, index)
                    self.optimizer.state[parameter]["step"] = step
            return
        for parameter in self.trainable.values():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            # Like AdamW's own state: the fused kernel expects the step on the device of the weights.
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    paths = (run / CHECKPOINTS).glob("*")
    return sorted((path for path in paths if re.fullmatch(r"\d{8,}", path.name)), key=lambda path: int(path.name))


class StateArrays:
    """Reads the unsharded arrays of a saved state one at a time, written by any number of processes."""

    def __init__(self, folder: pathlib.Path) -> None:
        metadata = _headers(dcp.HuggingFaceStorageReader(str(folder)))
        self._entries: dict[str, Any] = dict(metadata.state_dict_metadata)
        self.names = tuple(self._entries)
        self._chunks: dict[str, list[Any]] = {}
        for index, chunk in metadata.storage_data.items():
            self._chunks.setdefault(index.fqn, []).append((index.offset, chunk))

    def read(self, name: str) -> Tensor:
        """Read an array to the CPU."""
        entry = self._entries[name]
        array = torch.empty(entry.size, dtype=entry.properties.dtype)
        for offset, chunk in self._chunks[name]:
            region = tuple(slice(start, start + size) for start, size in zip(offset, chunk.shape, strict=True))
            with safetensors.safe_open(chunk.relative_path, framework="pt") as file:
                array[region] = file.get_tensor(name)
        return array


def _headers(reader: "dcp.HuggingFaceStorageReader") -> Any:
    """Read the shapes, dtypes and files of a saved state's arrays; raise an error if a file is missing."""
    metadata: Any = reader.read_metadata()  # Any: its type allows other entries than tensors
    for name, entry in metadata.state_dict_metadata.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise TrainingError(f"A file is missing in {reader.path}: there are only parts of {name}.")
    return metadata
