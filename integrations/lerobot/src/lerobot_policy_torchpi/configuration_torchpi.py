"""The policy type `torchpi`: a torchpi policy in the process."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from lerobot_policy_torchpi.errors import PluginError

SOURCE = ("checkpoint", "model_config", "embodiment", "norm_stats", "asset_id", "tokenizer", "default_prompt")
"""The options that decide the policy; one that is saved has what they said in its own files."""
FINETUNE = ("full", "frozen_vision", "expert")


def _identity() -> dict[str, NormalizationMode]:
    """No normalization by LeRobot: the policy normalizes itself."""
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@dataclass
class CommonConfig(PreTrainedConfig):
    """Options of both policy types, and what LeRobot asks of each."""

    cameras: dict[str, str] = field(default_factory=dict)
    """The policy's camera to LeRobot's image, where their keys end differently."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed; by default what the policy recommends, or else all."""
    rtc_config: RTCConfig | None = None
    """Set by LeRobot. torchpi's guidance has the schedule and the strength of the paper, whatever is stated here."""
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping = self.normalization_mapping
        if changed := [name for name, mode in mapping.items() if mode is not NormalizationMode.IDENTITY]:
            raise PluginError(
                f"normalization_mapping normalizes {', '.join(changed)}, which the policy does itself, with statistics "
                "of its own; leave it at IDENTITY."
            )
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise PluginError(f"n_action_steps is {self.n_action_steps}; expected at least 1.")

    def validate_features(self) -> None:
        """Nothing: the policy compares the features with its own, see `observations.check_features`."""

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """No reward."""
        return None


@PreTrainedConfig.register_subclass("torchpi")
@dataclass
class TorchpiConfig(CommonConfig):
    """Options of the policy; those of `SOURCE` are arguments of `torchpi.load_policy`."""

    checkpoint: str | None = None
    """The policy or checkpoint: a folder, hf://ORG/NAME, gs://…, or "demo". Not with --policy.path."""
    model_config: str | None = None
    """The model's sizes, as far as the checkpoint does not say them: a preset's name, or a JSON file."""
    embodiment: str | None = None
    """The robot, if not the checkpoint's: a name or a JSON file (torchpi data draft writes one for a dataset)."""
    norm_stats: str | None = None
    """Statistics: "checkpoint", "dataset" (of the one that is trained on), or a norm_stats.json; by default those of a
    checkpoint that has a robot, unless another embodiment is stated, and otherwise, in training, the dataset's."""
    asset_id: str | None = None
    """The statistics of an openpi checkpoint with several: assets/<asset_id>."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json."""
    default_prompt: str | None = None
    """The instruction where LeRobot has no task."""
    num_steps: int | None = None
    """Euler steps of an inference; by default the policy's."""
    dtype: str | None = None
    """Dtype of the computation, "float32" or "bfloat16"; by default the fastest that the device has."""
    engine: str = "auto"
    """Of inference outside of training: "auto" (CUDA graphs on a GPU), "eager", "compiled" or "graph"."""
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
        """The steps of a chunk, as many as the checkpoint says."""
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
