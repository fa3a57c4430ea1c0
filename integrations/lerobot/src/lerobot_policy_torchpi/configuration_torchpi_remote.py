"""Configuration of the policy type `torchpi_remote`: a policy on a server, without local weights or torchpi."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig

from lerobot_policy_torchpi.configuration_torchpi import CommonConfig
from lerobot_policy_torchpi.errors import PluginError

NOT_TRAINED = (
    "torchpi_remote has no weights and is not trained; train with --policy.type=torchpi, or with torchpi train."
)


@PreTrainedConfig.register_subclass("torchpi_remote")
@dataclass
class TorchpiRemoteConfig(CommonConfig):
    """Connection to the server. The token is read from the environment (TORCHPI_TOKEN), so that no file contains it."""

    server: str | None = None
    """Address: ws://HOST:PORT, or wss://… with TLS."""
    connect_timeout: float = 60.0
    """Seconds to wait for the server, which may be loading."""
    answer_timeout: float = 60.0
    """Seconds to wait for a chunk."""
    jpeg_quality: int | None = None
    """Send images as JPEG of this quality, 1 to 95; by default uncompressed."""

    @property
    def action_delta_indices(self) -> None:
        """None: no chunks of a dataset."""
        return None

    def get_optimizer_preset(self) -> None:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)

    def get_scheduler_preset(self) -> None:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)
