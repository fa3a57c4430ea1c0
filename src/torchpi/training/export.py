"""From a checkpoint's state to policy folders."""

import json
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchpi.policy import Policy
from torchpi.training.config import TrainConfig
from torchpi.training.state import STATE, StateArrays
from torchpi.transforms.normalize import save_norm_stats


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
        self._max_shard_bytes = 5 * 10**9

    def write(self, checkpoint: pathlib.Path, step: int) -> None:
        """Write `checkpoint`/policy, and for the other robots of a mixture policy/robots."""
        arrays = StateArrays(checkpoint / STATE)
        averaged = "ema" if self.config.ema_decay else "weights"

        def read(name: str) -> Tensor:
            return self._constant[name] if name in self._constant else arrays.read(f"{averaged}.{name}")

        policy, root = self.policies[0], checkpoint / "policy"
        root.mkdir()
        policy.provenance["step"] = step
        policy.write(root, dtype=torch.float32, max_shard_bytes=self._max_shard_bytes, read=read)
        for other in self.policies[1:]:
            self._write_robot(root / "robots", other)

    def _write_robot(self, folder: pathlib.Path, policy: Policy) -> None:
        """What `load_policy` needs to run the policy on another robot: embodiment= and norm_stats=."""
        own = folder / policy.embodiment.name
        own.mkdir(parents=True, exist_ok=True)
        document = json.dumps(policy.embodiment.to_dict(), indent=2, ensure_ascii=False)
        (own / "embodiment.json").write_text(f"{document}\n", encoding="utf-8")
        save_norm_stats(own / "norm_stats.json", policy.transforms.norm_stats)
