"""From a checkpoint's state to policy folders. What LoRA has learned is written without its base, as an adapter."""

import json
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchpi.checkpoints.adapter import Adapter, Base, digest, write_adapter
from torchpi.model.lora import LoraConfig, is_lora, lora_config, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.config import TrainConfig
from torchpi.training.setup import ROBOTS, robot_names
from torchpi.training.state import STATE, StateArrays
from torchpi.transforms.normalize import save_norm_stats

_MAX_SHARD_BYTES = 5 * 10**9


class Exporter:
    """Writes the policy of a checkpoint: the averaged weights out of its state, and those that the run does not change.

    It works beside the training and in one process, and so reads what was saved instead of asking the model.
    """

    def __init__(self, config: TrainConfig, policies: Sequence[Policy]) -> None:
        """
        Args:
            policies: one per dataset, around one model whose weights are on the CPU and whole.
        """
        self.config, self.policies = config, policies
        model = policies[0].model
        self._constant = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._adapter = None if (lora := lora_config(model)) is None else _adapter(config, model, lora)
        self._adapter_shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if self._adapter is not None and (is_lora(name) or name in self._adapter.trained)
        }

    def write(self, checkpoint: pathlib.Path, step: int) -> None:
        """Write `checkpoint`/policy, and for the other robots of a mixture policy/robots."""
        arrays = StateArrays(checkpoint / STATE)
        averaged = "ema" if self.config.optim.ema_decay else "weights"

        def read(name: str) -> Tensor:
            return self._constant[name] if name in self._constant else arrays.read(f"{averaged}.{name}")

        policy, root = self.policies[0], checkpoint / "policy"
        root.mkdir()
        policy.provenance["step"] = step
        if self._adapter is None:
            policy.write(root, dtype=torch.float32, max_shard_bytes=_MAX_SHARD_BYTES, read=read)
        else:
            policy.write_spec(root)
            write_adapter(root, self._adapter, self._adapter_shapes, read)
        names = robot_names([policy.embodiment for policy in self.policies])
        for other, name in zip(self.policies[1:], names[1:], strict=True):
            self._write_robot(root / ROBOTS / name, other)

    def _write_robot(self, own: pathlib.Path, policy: Policy) -> None:
        """What `load_policy` needs to run the policy on another robot: embodiment= and norm_stats=."""
        own.mkdir(parents=True)
        document = json.dumps(policy.embodiment.to_dict(), indent=2, ensure_ascii=False)
        (own / "embodiment.json").write_text(f"{document}\n", encoding="utf-8")
        save_norm_stats(own / "norm_stats.json", policy.transforms.norm_stats)


def _adapter(config: TrainConfig, model: Pi0, lora: LoraConfig) -> Adapter:
    assert config.model.init is not None
    is_address = config.model.init == "demo" or "://" in config.model.init
    address = config.model.init if is_address else str(pathlib.Path(config.model.init).expanduser().resolve())
    changed = trainable_parameters(model, config.model.finetune)
    trained = [name for name, is_trained in changed.items() if is_trained]
    sha256 = digest([name for name, is_trained in changed.items() if not is_trained], model.get_parameter)
    base = Base(address, config.model.frozen_dtype, sha256)
    return Adapter(lora, tuple(name for name in trained if not is_lora(name)), base)
