"""What a run consists of between two updates, and how it is kept on disk and taken up again.

RUN/constant/model.safetensors      the weights that the run does not change, written once
RUN/checkpoints/STEP/state/*        what it changes: weights, their average, AdamW's moments; of each process its part
RUN/checkpoints/STEP/policy         a policy folder with the averaged weights
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from torchpi.checkpoints.folder import make_durable
from torchpi.model.pi0 import Pi0
from torchpi.training.distributed import World, is_sharded, like, local
from torchpi.training.optim import Kind, make_optimizer

STATE, CHECKPOINTS = "state", "checkpoints"


@dataclasses.dataclass
class TrainState:
    """Weights, their moving average, the optimizer's moments, and the number of updates so far."""

    model: Pi0
    trained: dict[str, nn.Parameter]
    """The parameters that are updated, by name; DTensors where they are sharded."""
    parts: dict[str, nn.Parameter]
    """This process' parts of them, in the same memory: what the optimizer works on."""
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    """The moving averages of the parts; empty without one."""
    step: int = 0

    @classmethod
    def begin(cls, model: Pi0, *, weight_decay: float, ema: bool, optimizer: Kind = "adamw") -> "TrainState":
        """The state before the first update; the moving average begins at the weights."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parts = {
            name: nn.Parameter(local(parameter.detach())) if is_sharded(parameter) else parameter
            for name, parameter in trained.items()
        }
        averages = {name: part.detach().clone() for name, part in parts.items()} if ema else {}
        return cls(
            model, trained, parts, make_optimizer(parts.values(), weight_decay=weight_decay, kind=optimizer), averages
        )

    def take_gradients(self) -> list[Tensor]:
        """The gradients of the trained parameters, for the optimizer and for their norm."""
        for name, parameter in self.trained.items():
            if is_sharded(parameter) and parameter.grad is not None:
                self.parts[name].grad = local(parameter.grad)
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for parameter in (*self.trained.values(), *self.parts.values()):
            parameter.grad = None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[Pi0]:
        """The model with the moving average as its weights, for as long as the context lasts."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weights and averages change places, one array at a time."""
        for name, average in self.ema.items():
            part = self.parts[name].detach()
            before = part.clone()
            part.copy_(average)
            average.copy_(before)

    def tensors(self) -> dict[str, Tensor]:
        """What changes, under flat names: "weights.NAME", "ema.NAME", and the optimizer's "exp_avg.NAME", …."""
        named: dict[str, Tensor] = {f"weights.{name}": value.detach() for name, value in self.trained.items()}
        named |= {f"ema.{name}": like(value, self.trained[name]) for name, value in self.ema.items()}
        for name, part in self.parts.items():
            for key, value in self.optimizer.state.get(part, {}).items():
                if isinstance(value, Tensor) and value.ndim and not key.startswith("qmap"):
                    named[f"{key}.{name}"] = like(value, self.trained[name]) if value.shape == part.shape else value
        return named

    def load(self, folder: pathlib.Path, step: int) -> None:
        """Take up the state of a checkpoint, whatever number of processes has written it.

        Raises:
            ValueError: a file is missing or damaged, or does not fit the model.
        """
        self._make_moments(step)
        own = self.tensors()
        try:
            reader = HuggingFaceStorageReader(str(folder))
            found = {name: tuple(entry.size) for name, entry in _entries(reader).items()}
            shapes = {name: tuple(value.shape) for name, value in own.items()}
            if found != shapes:
                wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
                raise ValueError(f"it belongs to another model, recipe or optimizer: {', '.join(wrong[:6])} differ")
            dcp.load(own, storage_reader=reader)
        except (OSError, ValueError, safetensors.SafetensorError, dcp.api.CheckpointException) as error:
            raise ValueError(f"{folder} can't be taken up: {error}; take an older checkpoint") from error
        self.step = step

    def _make_moments(self, step: int) -> None:
        """The optimizer's state, which it makes itself at its first step, with values to be read."""
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes
            for group_number, group in enumerate(self.optimizer.param_groups):
                for number, part in enumerate(group["params"]):
                    self.optimizer.init_state(group, part, group_number, number)
                    self.optimizer.state[part]["step"] = step
            return
        for part in self.parts.values():
            moments = {name: torch.zeros_like(part, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[part] = {"step": torch.tensor(float(step)), **moments}


class Checkpointer:
    """Writes checkpoints beside the training, one at a time.

    A checkpoint is complete under its name or not there. The tensors are copied before training goes on, so the memory
    of one state is needed on the CPU.
    """

    def __init__(
        self,
        run: pathlib.Path,
        world: World,
        *,
        keep: int,
        keep_every: int | None,
        finish: Callable[[pathlib.Path, int], None] | None,
    ) -> None:
        """
        Args:
            keep: how many checkpoints stay, the newest ones.
            keep_every: those at multiples of this step stay as well.
            finish: in the first process, writes the rest of a checkpoint into the folder in which "state" is complete;
                its second argument is the step.
        """
        self.folder, self.world = run / CHECKPOINTS, world
        self.keep, self.keep_every, self.finish = keep, keep_every, finish
        # A group of its own: what the threads that write say to each other does not meet what training says.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for rest in self.folder.glob(".*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(rest)
        dist.barrier()

    def save(self, state: TrainState) -> pathlib.Path:
        """Begin to write a checkpoint of the state as it is now; its place. Waits for the one before.

        Raises:
            OSError: of the checkpoint before, for example because the disk is full; see `wait`.
        """
        self.wait()
        target, beside = self.folder / f"{state.step:08d}", self.folder / f".{state.step:08d}.tmp"
        if target.exists():
            return target
        writer = HuggingFaceStorageWriter(str(beside / STATE), save_distributed=True)
        written = dcp.async_save(state.tensors(), storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._complete, written, beside, target, state.step)
        return target

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete.

        Raises:
            OSError, …: what has kept it from being written; nothing is under its name then.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _complete(self, written: Future[Any], beside: pathlib.Path, target: pathlib.Path, step: int) -> None:
        try:
            written.result()
            if self.finish is not None:
                self.finish(beside, step)
                make_durable(beside)
                os.rename(beside, target)
                self._remove_old()
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def _remove_old(self) -> None:
        for old in checkpoints(self.folder.parent)[: -self.keep]:
            if not (self.keep_every and int(old.name) % self.keep_every == 0):
                # Out of the way first: a kill in the middle must not leave a part under the name.
                out_of_the_way = self.folder / f".{old.name}.tmp"
                os.rename(old, out_of_the_way)
                shutil.rmtree(out_of_the_way)


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


class StateArrays:
    """The whole arrays of a checkpoint's state, one at a time, whatever number of processes has written them."""

    def __init__(self, folder: pathlib.Path) -> None:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
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


def _entries(reader: HuggingFaceStorageReader) -> dict[str, Any]:
    """Shapes and dtypes by name, out of the files' headers."""
    return dict(reader.read_metadata().state_dict_metadata)
