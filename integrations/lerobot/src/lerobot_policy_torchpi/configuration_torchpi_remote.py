"""The policy type `torchpi_remote`: a policy on a server; neither weights nor torchpi are needed here."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from lerobot_policy_torchpi.configuration_torchpi import identity, require_identity
from lerobot_policy_torchpi.errors import PluginError

NOT_TRAINED = (
    "torchpi_remote has no weights and is not trained; train with --policy.type=torchpi, or with torchpi train."
)


@PreTrainedConfig.register_subclass("torchpi_remote")
@dataclass
class TorchpiRemoteConfig(PreTrainedConfig):
    """The server and how to ask it. A token is taken from the environment, TORCHPI_TOKEN: it belongs into no file."""

    server: str | None = None
    """Its address: ws://HOST:PORT, or wss://… with TLS."""
    cameras: dict[str, str] = field(default_factory=dict)
    """The policy's camera to LeRobot's image, where their keys end differently."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed; by default what the policy recommends, or else all."""
    connect_timeout: float = 60.0
    """Seconds to wait for the server, which may be loading."""
    answer_timeout: float = 60.0
    """Seconds to wait for a chunk."""
    jpeg_quality: int | None = None
    """Send images as JPEG of this quality, 1 to 95; by default uncompressed."""
    rtc_config: RTCConfig | None = None
    """Set by LeRobot."""
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=identity)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_identity(self.normalization_mapping)
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise PluginError(f"n_action_steps is {self.n_action_steps}; expected at least 1.")

    def validate_features(self) -> None:
        """Nothing: the policy compares the features with the server's, see `observations.check_features`."""

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """No chunks of a dataset."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """No reward."""
        return None

    def get_optimizer_preset(self) -> None:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)

    def get_scheduler_preset(self) -> None:
        """Refuse to train."""
        raise PluginError(NOT_TRAINED)
