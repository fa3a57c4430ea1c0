"""Configuration of the policy type `torchpi`: a torchpi policy in LeRobot's process."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from lerobot_policy_torchpi.errors import PluginError

SOURCE = ("checkpoint", "model_config", "embodiment", "norm_stats", "asset_id", "tokenizer", "default_prompt")
"""Options that determine the policy; a saved policy contains their values in its own files."""
FINETUNE = ("full", "frozen_vision", "expert")


def _identity() -> dict[str, NormalizationMode]:
    """No normalization by LeRobot: the policy normalizes itself."""
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@dataclass
class CommonConfig(PreTrainedConfig):
    """Options of both policy types, and LeRobot's required properties."""

    cameras: dict[str, str] = field(default_factory=dict)
    """LeRobot's image for each of the policy's cameras whose key ends differently."""
    n_action_steps: int | None = None
    """Number of executed actions per chunk; by default the policy's recommendation, otherwise all."""
    rtc_config: RTCConfig | None = None
    """Set by LeRobot. torchpi's guidance always uses the paper's schedule and strength."""
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping = self.normalization_mapping
        if changed := [name for name, mode in mapping.items() if mode is not NormalizationMode.IDENTITY]:
            raise PluginError(
                f"normalization_mapping normalizes {', '.join(changed)}, which the policy does itself with its own "
                "statistics; leave it at IDENTITY."
            )
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise PluginError(f"n_action_steps is {self.n_action_steps}; expected at least 1.")

    def validate_features(self) -> None:
        """Do nothing: the policy compares the features with its own, see `observations.check_features`."""

    @property
    def observation_delta_indices(self) -> None:
        """None: one observation."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """None: no reward."""
        return None


@PreTrainedConfig.register_subclass("torchpi")
@dataclass
class TorchpiConfig(CommonConfig):
    """Options of the policy; those of `SOURCE` are arguments of `torchpi.load_policy`."""

    checkpoint: str | None = None
    """Policy or checkpoint: a folder, hf://ORG/NAME, gs://…, or "demo". Not with --policy.path."""
    model_config: str | None = None
    """Model sizes that the checkpoint does not state: a preset's name, or a JSON file."""
    embodiment: str | None = None
    """Robot, if not the checkpoint's: a name or a JSON file (torchpi data draft writes one for a dataset)."""
    norm_stats: str | None = None
    """Statistics: "checkpoint", "dataset" (the training dataset's), or a norm_stats.json. By default those of a
    checkpoint that has a robot, unless another embodiment is given; otherwise, in training, the dataset's."""
    asset_id: str | None = None
    """Folder assets/<asset_id> with the statistics, if an openpi checkpoint has several."""
    tokenizer: str | None = None
    """SentencePiece model or tokenizer.json."""
    default_prompt: str | None = None
    """Instruction if LeRobot has no task."""
    num_steps: int | None = None
    """Euler steps per inference; by default the policy's."""
    dtype: str | None = None
    """Dtype of the computation, "float32" or "bfloat16"; by default the device's fastest."""
    engine: str = "auto"
    """Engine for inference outside training: "auto" (CUDA graphs on a GPU), "eager", "compiled" or "graph"."""
    finetune: str = "full"
    """Trained parameters: "full", "frozen_vision" or "expert" (the action expert and the projections)."""
    activation_checkpointing: str = "none"
    """Activations that are recomputed in the backward pass: "none", "selective" or "full"."""
    optimizer_lr: float = 2.5e-5
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("finetune", FINETUNE),
            ("activation_checkpointing", ("none", "selective", "full")),
            ("engine", ("auto", "eager", "compiled", "graph")),
            ("dtype", (None, "float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                expected = ", ".join(str(each) for each in known if each)
                raise PluginError(f"{name} is {getattr(self, name)!r}; expected one of {expected}.")

    @property
    def action_delta_indices(self) -> list[int]:
        """Steps of a chunk; the checkpoint states their number."""
        from lerobot_policy_torchpi.local import action_horizon

        return list(range(action_horizon(self)))

    def get_optimizer_preset(self) -> AdamWConfig:
        """openpi's optimizer."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """openpi's learning-rate schedule, which LeRobot shortens for a shorter run."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )
