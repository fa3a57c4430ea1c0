"""What a run consists of between two updates, and how it is kept on disk and taken up again."""

import contextlib
import dataclasses
import pathlib
import re
import shutil
from collections.abc import Iterator

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from torchpi.checkpoints.folder import atomic_folder
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.optim import make_optimizer

WEIGHTS = "train_state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class TrainState:
    """Weights, their moving average, the optimizer's moments, and the number of updates so far."""

    model: Pi0
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor]
    """Empty without a moving average."""
    step: int = 0

    @classmethod
    def begin(cls, model: Pi0, *, weight_decay: float, ema: bool) -> "TrainState":
        """The state before the first update; the moving average begins at the weights."""
        optimizer = make_optimizer(model.parameters(), weight_decay=weight_decay)
        averages = {name: p.detach().clone() for name, p in model.named_parameters()} if ema else {}
        return cls(model, optimizer, averages)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[Pi0]:
        """The model with the moving average as its weights, for as long as the context lasts."""
        if not self.ema:
            yield self.model
            return
        own = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = self.ema[name]
            yield self.model
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = own[name]

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names."""
        named = {f"weights.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        named |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            named |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        return named

    def load(self, path: pathlib.Path, step: int) -> None:
        """Take up the state that `save_checkpoint` wrote.

        Raises:
            ValueError: the file is damaged, or does not fit the model.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing, truncated or damaged: {error}; take an older checkpoint") from error
        for name, parameter in self.model.named_parameters():
            # Updates of parameters without a gradient keep no moments.
            if f"{_MOMENTS[0]}.{name}" in found:
                moments = {moment: found.pop(f"{moment}.{name}").to(parameter.device) for moment in _MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        own = self.tensors()
        own = {name: value for name, value in own.items() if name.split(".")[0] in ("weights", "ema")}
        if set(own) != set(found) or any(own[name].shape != found[name].shape for name in own):
            raise ValueError(f"{path} belongs to another model: {sorted(set(own) ^ set(found))[:6]} or their shapes")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(found[name])
        self.step = step


def save_checkpoint(run: pathlib.Path, state: TrainState, policy: Policy, *, keep: int) -> pathlib.Path:
    """Write checkpoints/<step> atomically, a policy folder with the averaged weights and the state to resume from.

    Args:
        policy: whose model is the state's.
        keep: how many checkpoints stay, the newest ones.
    """
    target = run / "checkpoints" / f"{state.step:08d}"
    if target.exists():
        return target
    with atomic_folder(target) as beside:
        policy.provenance["step"] = state.step
        with state.averaged_weights():
            policy.save(beside / "policy")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors().items()}
        safetensors.torch.save_file(tensors, beside / WEIGHTS)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))
