"""Export of a checkpoint's state to policy folders. Trained LoRA is written without its base, as an adapter."""

import json
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchpi.checkpoints.adapter import Adapter, Base, digest, write_adapter
from torchpi.checkpoints.folder import write_weights
from torchpi.model.lora import LoraConfig, is_lora, lora_config, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.config import TrainConfig
from torchpi.training.setup import ROBOTS, robot_names
from torchpi.training.state import STATE, StateArrays
from torchpi.transforms.normalize import save_norm_stats

_MAX_SHARD_BYTES = 5 * 10**9


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
