"""What a run consists of between two updates, and how it is kept on disk and taken up again.

RUN/checkpoints/STEP/state/*        what it changes: weights, their average, AdamW's moments; of each process its share
RUN/checkpoints/STEP/policy         a policy folder with the averaged weights

The weights that a run does not change are not in its state: they come from where they came from at its beginning.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from torchpi.atomic import fsync, make_durable
from torchpi.errors import TrainingError
from torchpi.model.pi0 import Pi0
from torchpi.training.config import Optimizer
from torchpi.training.distributed import (
    PATIENCE,
    World,
    copy_number,
    is_sharded,
    like,
    local,
    own_share,
    release_gathered,
)
from torchpi.training.optim import make_optimizer

STATE, CHECKPOINTS = "state", "checkpoints"

# A file is put together in memory before it is written: the smaller, the less memory that takes.
_FILE_BYTES = 10**9


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
    def begin(cls, model: Pi0, *, weight_decay: float, ema: bool, optimizer: Optimizer = "adamw") -> "TrainState":
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
        release_gathered(self.model)
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
        """Take up the state of a checkpoint, whatever number of processes has written it."""
        self._make_moments(step)
        own = self.tensors()
        try:
            reader = HuggingFaceStorageReader(str(folder))
            found = {name: tuple(entry.size) for name, entry in _headers(reader).state_dict_metadata.items()}
            shapes = {name: tuple(value.shape) for name, value in own.items()}
            if found != shapes:
                wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
                raise TrainingError(f"It belongs to another model, recipe or optimizer: {', '.join(wrong[:6])} differ.")
            dcp.load(own, storage_reader=reader)
        except (OSError, ValueError, safetensors.SafetensorError, dcp.api.CheckpointException) as error:
            raise TrainingError(f"{folder} can't be taken up: {error}; take an older checkpoint.") from error
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
            # As AdamW makes it: its fused kernel reads the step where the weights are.
            self.optimizer.state[part] = {"step": torch.tensor(float(step), device=part.device), **moments}


class Checkpointer:
    """Writes checkpoints beside the training, one at a time.

    A checkpoint is complete under its name or not there. Training goes on as soon as the tensors are copied, so the CPU
    needs memory for one copy of what this process saves, and for a file of it at a time.
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
            finish: called in the first process, writes the rest of a checkpoint into the folder in which "state" is
                complete; its second argument is the step.
        """
        self.folder, self.world = run / CHECKPOINTS, world
        self.keep, self.keep_every, self.finish = keep, keep_every, finish
        # A group of its own: what the threads that write say to each other does not meet what training says.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # The memory for copies from a GPU is pinned, which makes them faster, and kept, because pinning is slow.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=world.device.type == "cuda")
        self._pending: Future[None] | None = None
        self._open_folder()

    def _open_folder(self) -> None:
        """Make the folder, see that it is the same one for all, and remove what a run that was killed has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f".process_{self.world.rank}.tmp").touch()
        self.world.wait_for_all()
        missing = self.world.size - len(list(self.folder.glob(".process_*.tmp")))
        self.world.wait_for_all()
        if missing:
            raise TrainingError(
                f"{missing} of the {self.world.size} processes have another folder {self.folder} than process "
                f"{self.world.rank}; put the run where all nodes see the same files."
            )
        if self.world.first:
            for rest in self.folder.glob(".*.tmp"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        self.world.wait_for_all()

    def save(self, state: TrainState) -> pathlib.Path:
        """Begin to write a checkpoint of the state as it is now; its place. Waits for the one before."""
        self.wait()
        whole = state.tensors()
        copies = self._stager.stage(own_share(whole, self.world))
        self._pending = self._thread.submit(self._write, copies, _file_numbers(whole, self.world), state.step)
        return self.folder / f"{state.step:08d}"

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete, or has failed, in all processes."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, copies: dict[str, Any], file_numbers: dict[str, int], step: int) -> None:
        beside = self.folder / f".{step:08d}.tmp"
        try:
            self._write_state(copies, file_numbers, beside / STATE)
            self._in_the_first(lambda: self._complete(beside, step))
        finally:
            if self.world.first:
                shutil.rmtree(beside, ignore_errors=True)

    def _write_state(self, copies: dict[str, Any], file_numbers: dict[str, int], folder: pathlib.Path) -> None:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_numbers, save_distributed=True)
        try:
            dcp.save(copies, storage_writer=writer, process_group=self._group)
        except dcp.api.CheckpointException as failed:
            rank, (error, _) = next(iter(failed.failures.items()))
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, error.filename or str(folder)) from failed
            raise RuntimeError(f"{folder} was not written: in process {rank}, {error!r}") from failed

    def _in_the_first(self, work: Callable[[], None]) -> None:
        """Run something in the first process; where it fails there, it fails in all."""
        outcome = [""]
        try:
            if self.world.first:
                work()
        except BaseException as error:
            outcome = [str(error)]
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            raise OSError(f"The first process has failed to write a checkpoint: {outcome[0]}.")

    def _complete(self, beside: pathlib.Path, step: int) -> None:
        if self.finish is not None:
            self.finish(beside, step)
        make_durable(beside)
        os.rename(beside, self.folder / f"{step:08d}")
        fsync(self.folder)  # before an older one is removed
        self._remove_old()

    def _remove_old(self) -> None:
        for old in checkpoints(self.folder.parent)[: -self.keep]:
            if not (self.keep_every and int(old.name) % self.keep_every == 0):
                # Out of the way first: a kill in the middle must not leave a part under the name.
                out_of_the_way = self.folder / f".{old.name}.tmp"
                os.rename(old, out_of_the_way)
                shutil.rmtree(out_of_the_way)


def _file_numbers(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """Which file of its process each tensor goes to; from 1."""
    numbers, size = dict[str, int](), 0
    for name, tensor in tensors.items():
        size += local(tensor).nbytes // copy_number(tensor, world)[1]
        numbers[name] = 1 + size // _FILE_BYTES
    # Without gaps, because a tensor may be larger than a file.
    order = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    return {name: order[number] for name, number in numbers.items()}


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


class StateArrays:
    """The whole arrays of a checkpoint's state, one at a time, whatever number of processes has written them."""

    def __init__(self, folder: pathlib.Path) -> None:
        """"""
        metadata = _headers(HuggingFaceStorageReader(str(folder)))
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


def _headers(reader: HuggingFaceStorageReader) -> Any:
    """What the files of a state say of themselves: shapes, dtypes, and where the parts of each array are."""
    metadata: Any = reader.read_metadata()  # Any: it may hold other things than tensors, which a state does not
    for name, entry in metadata.state_dict_metadata.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise TrainingError(f"A file is missing in {reader.path}: there are only parts of {name}.")
    return metadata
