"""Checkpoints, written while the training continues: the training state, and a policy folder made from it."""

import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from torchpi.atomic import fsync, make_durable
from torchpi.checkpoints.adapter import Adapter, Base, digest, write_adapter
from torchpi.checkpoints.folder import write_weights
from torchpi.errors import TrainingError
from torchpi.model.lora import LoraConfig, is_lora, lora_config, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.config import CheckpointConfig, TrainConfig
from torchpi.training.distributed import LONG_TIMEOUT, World, copy_number, local, own_share
from torchpi.training.setup import ROBOTS, robot_names
from torchpi.training.state import CHECKPOINTS, STATE, StateArrays, TrainState, checkpoints
from torchpi.transforms.normalize import save_norm_stats

# Each file is assembled in memory before it is written, so smaller files need less memory.
_FILE_BYTES = 10**9
_MAX_SHARD_BYTES = 5 * 10**9


def check_torch() -> None:
    """Check now, instead of at the first checkpoint, that this PyTorch can write distributed checkpoints."""
    writer = getattr(dcp, "HuggingFaceStorageWriter", None)  # PyTorch 2.8 has it with other arguments
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise TrainingError(
            f"Training writes its checkpoints with PyTorch 2.9 or newer; this is {torch.__version__}. Install a newer "
            "one: pip install 'torch>=2.9'."
        )


class Checkpointer:
    """Writes checkpoints in a background thread, one at a time.

    A folder with a checkpoint's name is always complete. Training continues as soon as the tensors are copied, so the
    host needs memory for one copy of the arrays that this process saves, and for one file at a time.
    """

    def __init__(
        self,
        run: pathlib.Path,
        world: World,
        config: CheckpointConfig,
        *,
        finish: Callable[[pathlib.Path, int], None] | None,
    ) -> None:
        """
        Args:
            finish: called in the main process with the checkpoint's folder, in which "state" is complete, and the
                step; writes the rest of the checkpoint.
        """
        self.folder, self.world, self.config, self.finish = run / CHECKPOINTS, world, config, finish
        # A group of its own: messages of the writing threads must not mix with those of the training.
        self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Copies from a GPU go to pinned memory, which is faster; it is kept, because pinning is slow.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=world.device.type == "cuda")
        self._pending: Future[None] | None = None
        self._open_folder()

    def _open_folder(self) -> None:
        """Create the folder, check that all processes see it, and remove incomplete files of a killed run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f".process_{self.world.rank}.tmp").touch()
        self.world.barrier()
        missing = self.world.size - len(list(self.folder.glob(".process_*.tmp")))
        self.world.barrier()
        if missing:
            raise TrainingError(
                f"{missing} of the {self.world.size} processes do not share the folder {self.folder} of process "
                f"{self.world.rank}; put the run where all nodes see the same files."
            )
        if self.world.is_main:
            for leftover in self.folder.glob(".*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.world.barrier()

    def save(self, state: TrainState) -> pathlib.Path:
        """Start writing a checkpoint of the current state, once the previous one is complete. Returns its path."""
        self.wait()
        tensors = state.tensors()
        copies = self._stager.stage(own_share(tensors, self.world))
        self._pending = self._thread.submit(self._write, copies, _file_numbers(tensors, self.world), state.step)
        return self.folder / f"{state.step:08d}"

    def wait(self) -> None:
        """Wait until all processes have written the pending checkpoint; raise its error if writing failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the pending checkpoint, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, copies: dict[str, Any], file_numbers: dict[str, int], step: int) -> None:
        temporary = self.folder / f".{step:08d}.tmp"
        try:
            self._write_state(copies, file_numbers, temporary / STATE)
            self._in_main(lambda: self._complete(temporary, step))
        finally:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write_state(self, copies: dict[str, Any], file_numbers: dict[str, int], folder: pathlib.Path) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_numbers, save_distributed=True)
        try:
            dcp.save(copies, storage_writer=writer, process_group=self._group)
        except dcp.api.CheckpointException as failed:
            rank, (error, _) = next(iter(failed.failures.items()))
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, error.filename or str(folder)) from failed
            raise RuntimeError(f"{folder} was not written: in process {rank}, {error!r}") from failed

    def _in_main(self, work: Callable[[], None]) -> None:
        """Run a function in the main process; an error there is raised in all processes."""
        message = [""]
        try:
            if self.world.is_main:
                work()
        except BaseException as error:
            message = [str(error)]
            raise
        finally:
            dist.broadcast_object_list(message, src=0, group=self._group)
        if message[0]:
            raise OSError(f"The main process has failed to write a checkpoint: {message[0]}.")

    def _complete(self, temporary: pathlib.Path, step: int) -> None:
        if self.finish is not None:
            self.finish(temporary, step)
        make_durable(temporary)
        os.rename(temporary, self.folder / f"{step:08d}")
        fsync(self.folder)  # before an older checkpoint is removed
        self._remove_old()

    def _remove_old(self) -> None:
        for old in checkpoints(self.folder.parent)[: -self.config.keep]:
            if not (self.config.keep_every and int(old.name) % self.config.keep_every == 0):
                # Renamed first, so that a kill during the removal leaves no incomplete folder with a checkpoint's name.
                renamed = self.folder / f".{old.name}.tmp"
                os.rename(old, renamed)
                shutil.rmtree(renamed)


def _file_numbers(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """Assign each tensor to one of the files of its process, numbered from 1."""
    ends = np.cumsum([local(tensor).nbytes // copy_number(tensor, world)[1] for tensor in tensors.values()])
    numbers = np.unique(ends // _FILE_BYTES, return_inverse=True)[
        1
    ]  # no gaps in the numbers if a tensor is larger than a file
    return dict(zip(tensors, (numbers + 1).tolist(), strict=True))


class Exporter:
    """Writes the policy folder of a checkpoint, from the EMA weights of its saved state and the frozen weights.

    It reads the saved state instead of the model, because it runs in one process while the training continues.
    """

    def __init__(self, config: TrainConfig, policies: Sequence[Policy]) -> None:
        """
        Args:
            policies: one per dataset, around one model, whose weights are still on the CPU and not sharded.
        """
        self.config, self.policies = config, policies
        model = policies[0].model
        self._frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._adapter = None if (lora := lora_config(model)) is None else _adapter(config, model, lora)
        self._adapter_shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if self._adapter is not None and (is_lora(name) or name in self._adapter.trained)
        }

    def write(self, checkpoint: pathlib.Path, step: int) -> None:
        """Write `checkpoint`/policy, with a folder policy/robots/NAME for each further robot of a mixture."""
        arrays = StateArrays(checkpoint / STATE)
        kind = "ema" if self.config.optim.ema_decay else "weights"

        def read(name: str) -> Tensor:
            return self._frozen[name] if name in self._frozen else arrays.read(f"{kind}.{name}")

        policy, root = self.policies[0], checkpoint / "policy"
        root.mkdir()
        policy.provenance["step"] = step
        policy.write_spec(root)
        if self._adapter is None:
            write_weights(root, policy.model, dtype=torch.float32, max_shard_bytes=_MAX_SHARD_BYTES, read=read)
        else:
            write_adapter(root, self._adapter, self._adapter_shapes, read)
        names = robot_names([policy.embodiment for policy in self.policies])
        for other, name in zip(self.policies[1:], names[1:], strict=True):
            # The files for load_policy(…, embodiment=, norm_stats=).
            folder = root / ROBOTS / name
            folder.mkdir(parents=True)
            document = json.dumps(other.embodiment.to_dict(), indent=2, ensure_ascii=False)
            (folder / "embodiment.json").write_text(f"{document}\n", encoding="utf-8")
            save_norm_stats(folder / "norm_stats.json", other.transforms.norm_stats)


def _adapter(config: TrainConfig, model: Pi0, lora: LoraConfig) -> Adapter:
    init = config.model.init
    assert init is not None
    address = init if init == "demo" or "://" in init else str(pathlib.Path(init).expanduser().resolve())
    is_trained = trainable_parameters(model, config.model.finetune)
    sha256 = digest([name for name in is_trained if not is_trained[name]], model.get_parameter)
    trained = tuple(name for name in is_trained if is_trained[name] and not is_lora(name))
    return Adapter(lora, trained, Base(address, config.model.frozen_dtype, sha256))
