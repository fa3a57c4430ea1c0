"""LeRobot policy that runs a torchpi policy in the process."""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_torchpi import local
from lerobot_policy_torchpi.chunks import ChunkPolicy, LeftOver
from lerobot_policy_torchpi.configuration_torchpi import SOURCE, TorchpiConfig
from lerobot_policy_torchpi.errors import PluginError
from lerobot_policy_torchpi.observations import ACTION, check_features, requests_of, require_format
from torchpi.checkpoints.folder import tokenizer_file, write_weights
from torchpi.collate import collate
from torchpi.model.flow import sample_time
from torchpi.types import PreviousChunk


class TorchpiPolicy(ChunkPolicy, PreTrainedPolicy):
    """LeRobot policy with torchpi's transforms, normalization and model; LeRobot trains the module `model`.

    With LeRobot's dataset the policy is created for training: float32 weights, computation in `dtype`. Otherwise it is
    created for inference, in `dtype` and with an engine, which requires constant weights.
    """

    config_class = TorchpiConfig
    name = "torchpi"

    def __init__(self, config: TorchpiConfig, *, dataset_meta: Any = None, dataset_stats: Any = None) -> None:
        """Load the policy; `dataset_stats` are not used, see `TorchpiConfig.norm_stats`."""
        super().__init__(config)
        self.is_trained = dataset_meta is not None
        self.torchpi = local.open_to_train(config, dataset_meta) if self.is_trained else local.load_to_act(config)
        self.model = self.torchpi.model
        self.metadata = self.torchpi.metadata
        require_format(self.metadata, local.address(config))
        check_features(config, self.metadata)
        self._has_engine = self.is_trained
        self.reset()

    def _infer(
        self, requests: Sequence[dict[str, Any]], left_over: Sequence[LeftOver | None], noise: np.ndarray | None
    ) -> Sequence[Mapping[str, Any]]:
        if not self._has_engine:  # LeRobot has moved the model to its device by now
            self.torchpi.use_engine(self.config.engine)
            self._has_engine = True
        prefixes = [None if rest is None else PreviousChunk(rest.actions, rest.delay) for rest in left_over]
        return list(self.torchpi.infer_batch(requests, noise=noise, num_steps=self.config.num_steps, prefixes=prefixes))

    def supports_rtc(self) -> bool:
        """True: any policy can be guided, and one trained with action prefixes continues them."""
        return True

    def forward(
        self,
        batch: dict[str, Any],
        reduction: str = "mean",
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the flow-matching loss over the whole chunk and padded dimensions, as in openpi.

        Args:
            batch: see `requests_of`, and "action" [B, H, a] in the robot's units.
            reduction: "mean", or "none" for one loss per sample, [B].
            noise: x at t = 1, [B, H, action_dim]; drawn by default.
            time: t, [B]; drawn by default.
        """
        if not self.is_trained:
            raise PluginError(
                "This policy was loaded for inference, maybe in bfloat16; create it with LeRobot's dataset "
                "(dataset_meta=), as lerobot-train does."
            )
        requests = requests_of(batch, self.metadata["observation"], self.config.cameras)
        rows = zip(requests, batch[ACTION].float().cpu().numpy(), strict=True)
        with ThreadPoolExecutor() as threads:  # PIL and the tokenizer release the GIL
            prepared = threads.map(self.torchpi.prepare, [{**request, "actions": actions} for request, actions in rows])
            samples = [sample for _, sample in prepared]
        device = self.model.device
        actions = torch.from_numpy(np.stack([sample["actions"] for sample in samples])).float().to(device)
        if noise is None:
            noise = torch.randn(actions.shape, device=device)
        if time is None:
            time = sample_time(len(actions), device=device)
        with torch.autocast(device.type, enabled=False):  # the policy sets its own dtype
            loss = self.model(collate(samples).to(device), actions, noise=noise, time=time)  # [B, H]
        return (loss.mean() if reduction == "mean" else loss.mean(dim=1)), {}

    def get_optim_params(self) -> list[Tensor]:
        """Trainable parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def wrap_with_peft(self, *_: Any, **__: Any) -> Any:
        """Refuse PEFT's adapters, which the policy folder would not contain."""
        raise PluginError(
            "torchpi's policies do not support PEFT. Train a part of the weights (--policy.finetune=expert), or "
            "LoRA with torchpi train --finetune lora, whose policy LeRobot runs as --policy.checkpoint."
        )

    def _save_pretrained(self, save_directory: pathlib.Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that is both a LeRobot policy and a torchpi policy folder.

        Args:
            state_dict: state of this module, if it was gathered from several processes.
        """
        self.config._save_pretrained(save_directory)
        self.torchpi.write_spec(pathlib.Path(save_directory))
        read = None if state_dict is None else lambda name: state_dict[f"model.{name}"]
        write_weights(pathlib.Path(save_directory), self.model, read=read)

    def push_model_to_hub(self, cfg: Any, **options: Any) -> None:
        """Upload the policy, including tokenizer.model, which LeRobot's own upload leaves out."""
        super().push_model_to_hub(cfg, **options)
        with tempfile.TemporaryDirectory() as folder:
            self.torchpi.write_tokenizer(pathlib.Path(folder))
            if (file := tokenizer_file(pathlib.Path(folder))) is not None:
                HfApi().upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=self.config.repo_id)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: Any,
        *,
        config: Any = None,
        revision: str | None = None,
        dataset_meta: Any = None,
        dataset_stats: Any = None,
        **options: Any,
    ) -> Self:
        """Load a policy saved by `_save_pretrained`, from a folder or a repository of the Hub.

        Args:
            pretrained_name_or_path: None for the policy of `config.checkpoint`.
            config: replaces the saved options; those of `SOURCE` must be equal.

        Raises:
            ValueError: an option of `SOURCE` differs from the saved one.
        """
        if given := sorted(name for name, value in options.items() if value):
            raise PluginError(f"from_pretrained takes no {', '.join(given)}; set TORCHPI_HOME and HF_TOKEN instead.")
        if pretrained_name_or_path is not None:
            saved = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
            config = config or saved
            config.pretrained_path, config.pretrained_revision = pretrained_name_or_path, revision
            _require_same_source(saved, config, pretrained_name_or_path)
        policy = cls(config, dataset_meta=dataset_meta)
        policy.to(config.device)
        return policy.eval()


def _require_same_source(saved: Any, config: Any, path: Any) -> None:
    for name in SOURCE:
        before, now = getattr(saved, name), getattr(config, name)
        if before != now:
            raise PluginError(
                f"{path} was saved with {name} {before!r}, but {now!r} is requested; a saved policy can't be changed. "
                "To create another one from it: "
                f"--policy.type=torchpi --policy.checkpoint={path} --policy.{name}={now}."
            )
