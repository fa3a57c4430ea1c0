"""LeRobot policy that uses a policy server."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_torchpi.chunks import ChunkPolicy, LeftOver
from lerobot_policy_torchpi.configuration_torchpi_remote import NOT_TRAINED, TorchpiRemoteConfig
from lerobot_policy_torchpi.errors import MissingKeyError, PluginError
from lerobot_policy_torchpi.observations import check_features, require_format
from torchpi_client import WebsocketPolicy
from torchpi_client.protocol import RTC, PreviousChunk, require_support


class TorchpiRemotePolicy(ChunkPolicy, PreTrainedPolicy):
    """LeRobot policy that sends observations to a server and receives chunks."""

    config_class = TorchpiRemoteConfig
    name = "torchpi_remote"

    def __init__(self, config: TorchpiRemoteConfig, **_: Any) -> None:
        """Connect; LeRobot's dataset is not needed."""
        super().__init__(config)
        if config.server is None:
            raise MissingKeyError(
                "No policy server is given; pass --policy.server=ws://HOST:PORT, the address that torchpi serve prints."
            )
        self.client = WebsocketPolicy(
            config.server,
            api_key=os.environ.get("TORCHPI_TOKEN"),
            timeout=config.connect_timeout,
            answer_timeout=config.answer_timeout,
            jpeg_quality=config.jpeg_quality,
        )
        self.metadata = self.client.metadata
        require_format(self.metadata, f"The policy of {config.server}")
        check_features(config, self.metadata)
        self.reset()

    def _infer(
        self, requests: Sequence[dict[str, Any]], left_over: Sequence[LeftOver | None], noise: np.ndarray | None
    ) -> Sequence[Mapping[str, Any]]:
        if noise is not None:
            raise PluginError("torchpi_remote takes no noise, because the server draws it.")
        horizon, answers = self.metadata["action_horizon"], []
        for request, rest in zip(requests, left_over, strict=True):
            if rest is not None:
                require_support(dict(self.metadata), RTC, "Use --inference.type=sync.", server=self.client.url)
                actions = rest.actions[: horizon - 1]  # at least one action was executed
                delay = min(rest.delay, len(actions))
                request[RTC] = PreviousChunk(actions, delay, horizon - len(actions)).to_wire()
            answers.append(self.client.infer(request))
        return answers

    def supports_rtc(self) -> bool:
        """True if the server supports it."""
        return self.metadata.get(RTC) is True

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)

    def get_optim_params(self) -> dict[str, Any]:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)

    def _save_pretrained(self, save_directory: pathlib.Path, state_dict: Any = None) -> None:
        self.config._save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: Any, *, config: Any = None, revision: str | None = None, **_: Any
    ) -> Self:
        """Create the policy from a config.json, or from `config`; there are no weights to load."""
        policy = cls(config or PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision))
        return policy.eval()
