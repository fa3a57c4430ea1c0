"""The state of a run between two updates: weights, their EMA and AdamW's moments; read from a checkpoint.

RUN/checkpoints/STEP/state/*        the state, of each process its share; frozen weights come from `init` again
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
    """Trainable parameters by name; DTensors where they are sharded, and so are gradients, moments and EMA."""
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    """Empty without one."""
    step: int = 0

    @classmethod
    def create(cls, model: Pi0, *, weight_decay: float, ema: bool, optimizer: Optimizer = "adamw") -> "TrainState":
        """The state before the first update; the EMA starts at the weights."""
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        averages = {name: parameter.detach().clone() for name, parameter in trainable.items()} if ema else {}
        made = make_optimizer(trainable.values(), weight_decay=weight_decay, kind=optimizer)
        return cls(model, trainable, made, averages)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[Pi0]:
        """The model with its EMA weights, for as long as the context lasts."""
        self._swap_ema()
        try:
            yield self.model
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        """Swap weights and EMA, one array at a time."""
        release_gathered(self.model)
        for name, average in self.ema.items():
            weights = self.trainable[name]
            before = weights.clone()
            weights.copy_(average)
            average.copy_(before)

    def tensors(self) -> dict[str, Tensor]:
        """The state under flat names: "weights.NAME", "ema.NAME", and the optimizer's "exp_avg.NAME", …."""
        named: dict[str, Tensor] = {f"weights.{name}": value.detach() for name, value in self.trainable.items()}
        named |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim and not key.startswith("qmap"):
                    named[f"{key}.{name}"] = value
        return named

    def load(self, folder: pathlib.Path, step: int) -> None:
        """Load the state of a checkpoint, whatever number of processes has written it."""
        self._make_moments(step)
        own = self.tensors()
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            found = {name: tuple(entry.size) for name, entry in _headers(reader).state_dict_metadata.items()}
            shapes = {name: tuple(value.shape) for name, value in own.items()}
            if found != shapes:
                wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
                raise TrainingError(f"It belongs to another model, recipe or optimizer: {', '.join(wrong[:6])} differ.")
            dcp.load(own, storage_reader=reader)
        except (OSError, ValueError, safetensors.SafetensorError, dcp.api.CheckpointException) as error:
            damaged = folder.parent
            older = [path for path in checkpoints(damaged.parent.parent) if int(path.name) < step]
            then = f"continues from {older[-1]}" if older else "begins with the first step: there is none before it"
            raise TrainingError(
                f"{folder} can't be loaded: {str(error).rstrip('.')}. Move the checkpoint {damaged} elsewhere or "
                f"delete it; --resume then {then}."
            ) from error
        self.step = step

    def _make_moments(self, step: int) -> None:
        """Make the optimizer's state, which it makes itself at its first step only, to be read."""
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes
            for group_number, group in enumerate(self.optimizer.param_groups):
                for number, part in enumerate(group["params"]):
                    self.optimizer.init_state(group, part, group_number, number)
                    self.optimizer.state[part]["step"] = step
            return
        for parameter in self.trainable.values():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            # As AdamW makes it: its fused kernel reads the step where the weights are.
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


class StateArrays:
    """The whole arrays of a checkpoint's state, one at a time, whatever number of processes has written them."""

    def __init__(self, folder: pathlib.Path) -> None:
        metadata = _headers(dcp.HuggingFaceStorageReader(str(folder)))
        self._entries: dict[str, Any] = dict(metadata.state_dict_metadata)
        self.names = tuple(self._entries)
        self._places: dict[str, list[Any]] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, []).append((index.offset, place))

    def read(self, name: str) -> Tensor:
        """An array, on the CPU."""
        entry = self._entries[name]
        array = torch.empty(entry.size, dtype=entry.properties.dtype)
        for offset, place in self._places[name]:
            part = tuple(slice(start, start + size) for start, size in zip(offset, place.shape, strict=True))
            with safetensors.safe_open(place.relative_path, framework="pt") as file:
                array[part] = file.get_tensor(name)
        return array


def _headers(reader: "dcp.HuggingFaceStorageReader") -> Any:
    """Shapes and dtypes of a state's arrays, and the places of their parts."""
    metadata: Any = reader.read_metadata()  # Any: it may hold other things than tensors, which a state does not
    for name, entry in metadata.state_dict_metadata.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise TrainingError(f"A file is missing in {reader.path}: there are only parts of {name}.")
    return metadata
