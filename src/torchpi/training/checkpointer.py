"""Checkpoints that are written while the training continues: the state, and of it the policy folder."""

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
from torchpi.training.distributed import PATIENCE, World, copy_number, local, own_share
from torchpi.training.setup import ROBOTS, robot_names
from torchpi.training.state import CHECKPOINTS, STATE, StateArrays, TrainState, checkpoints
from torchpi.transforms.normalize import save_norm_stats

# A file is put together in memory before it is written: the smaller, the less memory that takes.
_FILE_BYTES = 10**9
_MAX_SHARD_BYTES = 5 * 10**9


def check_torch() -> None:
    """Find now, and not at the first checkpoint, that this PyTorch can't write those of several processes."""
    writer = getattr(dcp, "HuggingFaceStorageWriter", None)  # since 2.8; in 2.8 with other arguments
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise TrainingError(
            f"Training writes its checkpoints with PyTorch 2.9 or newer; this is {torch.__version__}. Install a newer "
            "one: pip install 'torch>=2.9'."
        )


class Checkpointer:
    """Writes checkpoints in the background of the training, one at a time.

    A checkpoint is complete under its name or not there. Training continues once the tensors are copied, so the CPU
    needs memory for one copy of the arrays that this process saves, and for a file of them at a time.
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
            finish: called in the main process, writes the rest of a checkpoint into the folder in which "state" is
                complete; its second argument is the step.
        """
        self.folder, self.world, self.config, self.finish = run / CHECKPOINTS, world, config, finish
        # A group of its own: the messages of the writing threads must not meet those of the training.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # The memory for copies from a GPU is pinned, which makes them faster, and kept, because pinning is slow.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=world.device.type == "cuda")
        self._pending: Future[None] | None = None
        self._open_folder()

    def _open_folder(self) -> None:
        """Make the folder, check that all processes see it, and remove the remains of a run that was killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f".process_{self.world.rank}.tmp").touch()
        self.world.barrier()
        missing = self.world.size - len(list(self.folder.glob(".process_*.tmp")))
        self.world.barrier()
        if missing:
            raise TrainingError(
                f"{missing} of the {self.world.size} processes have another folder {self.folder} than process "
                f"{self.world.rank}; put the run where all nodes see the same files."
            )
        if self.world.is_main:
            for rest in self.folder.glob(".*.tmp"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        self.world.barrier()

    def save(self, state: TrainState) -> pathlib.Path:
        """Start to write a checkpoint of the state as it is now, after the one before is complete; returns its path."""
        self.wait()
        whole = state.tensors()
        copies = self._stager.stage(own_share(whole, self.world))
        self._pending = self._thread.submit(self._write, copies, _file_numbers(whole, self.world), state.step)
        return self.folder / f"{state.step:08d}"

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, or has failed, in all processes."""
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
            self._in_main(lambda: self._complete(beside, step))
        finally:
            if self.world.is_main:
                shutil.rmtree(beside, ignore_errors=True)

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
        """Run something in the main process; an error there is one in all."""
        outcome = [""]
        try:
            if self.world.is_main:
                work()
        except BaseException as error:
            outcome = [str(error)]
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            raise OSError(f"The main process has failed to write a checkpoint: {outcome[0]}.")

    def _complete(self, beside: pathlib.Path, step: int) -> None:
        if self.finish is not None:
            self.finish(beside, step)
        make_durable(beside)
        os.rename(beside, self.folder / f"{step:08d}")
        fsync(self.folder)  # before an older one is removed
        self._remove_old()

    def _remove_old(self) -> None:
        for old in checkpoints(self.folder.parent)[: -self.config.keep]:
            if not (self.config.keep_every and int(old.name) % self.config.keep_every == 0):
                # Out of the way first: a kill in the middle must not leave a part under the name.
                out_of_the_way = self.folder / f".{old.name}.tmp"
                os.rename(old, out_of_the_way)
                shutil.rmtree(out_of_the_way)


def _file_numbers(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """The number of the file of its process that each tensor goes to, from 1."""
    ends = np.cumsum([local(tensor).nbytes // copy_number(tensor, world)[1] for tensor in tensors.values()])
    numbers = np.unique(ends // _FILE_BYTES, return_inverse=True)[1]  # without gaps: a tensor may be larger than a file
    return dict(zip(tensors, (numbers + 1).tolist(), strict=True))


class Exporter:
    """Writes the policy of a checkpoint: the EMA weights out of its state, and the frozen ones.

    It runs in the background of the training and in one process, so it reads the saved state instead of the model.
    """

    def __init__(self, config: TrainConfig, policies: Sequence[Policy]) -> None:
        """
        Args:
            policies: one per dataset, around one model whose weights are on the CPU and whole.
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
        """Write `checkpoint`/policy, and policy/robots for the other robots of a mixture."""
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
            # What load_policy takes for another robot: embodiment= and norm_stats=.
            own = root / ROBOTS / name
            own.mkdir(parents=True)
            document = json.dumps(other.embodiment.to_dict(), indent=2, ensure_ascii=False)
            (own / "embodiment.json").write_text(f"{document}\n", encoding="utf-8")
            save_norm_stats(own / "norm_stats.json", other.transforms.norm_stats)


def _adapter(config: TrainConfig, model: Pi0, lora: LoraConfig) -> Adapter:
    init = config.model.init
    assert init is not None
    address = init if init == "demo" or "://" in init else str(pathlib.Path(init).expanduser().resolve())
    changed = trainable_parameters(model, config.model.finetune)
    sha256 = digest([name for name, is_trained in changed.items() if not is_trained], model.get_parameter)
    trained = tuple(name for name, is_trained in changed.items() if is_trained and not is_lora(name))
    return Adapter(lora, trained, Base(address, config.model.frozen_dtype, sha256))
