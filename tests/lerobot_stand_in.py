"""The part of LeRobot that lerobot_policy_torchpi uses, where LeRobot is not installed.

integrations/lerobot/tests has tests with LeRobot itself.
"""

import dataclasses
import enum
import importlib.metadata
import json
import pathlib
import sys
import types

import torch

VERSION = "0.6.1"
POLICIES = {}
"""The configs that were registered."""


class NormalizationMode(enum.StrEnum):
    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"


@dataclasses.dataclass
class RTCConfig:
    enabled: bool = True
    execution_horizon: int = 10


@dataclasses.dataclass
class Feature:
    shape: tuple[int, ...]


@dataclasses.dataclass
class PreTrainedConfig:
    input_features: dict = dataclasses.field(default_factory=dict)
    output_features: dict = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    repo_id: str | None = None
    pretrained_path: str | None = None
    pretrained_revision: str | None = None

    def __post_init__(self):
        pass

    @staticmethod
    def register_subclass(name):
        return lambda cls: POLICIES.setdefault(name, cls)

    def _save_pretrained(self, folder):
        kind = next(name for name, cls in POLICIES.items() if cls is type(self))
        document = {"type": kind, **dataclasses.asdict(self), "pretrained_path": None}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(document))

    @classmethod
    def from_pretrained(cls, folder, *, revision=None):
        document = json.loads((pathlib.Path(folder) / "config.json").read_text())
        modes = {key: NormalizationMode(value) for key, value in document.pop("normalization_mapping").items()}
        return POLICIES[document.pop("type")](**document, normalization_mapping=modes)


class PreTrainedPolicy(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def save_pretrained(self, folder, *, state_dict=None):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(pathlib.Path(folder), state_dict=state_dict)


def install(setitem=sys.modules.__setitem__, version=VERSION):
    """Put the stand-in where LeRobot would be."""
    contents = {
        "lerobot": {},
        "lerobot.configs": {"NormalizationMode": NormalizationMode, "PreTrainedConfig": PreTrainedConfig},
        "lerobot.optim": {"AdamWConfig": dict, "CosineDecayWithWarmupSchedulerConfig": dict},
        "lerobot.policies": {},
        "lerobot.policies.pretrained": {"PreTrainedPolicy": PreTrainedPolicy},
        "lerobot.policies.rtc": {},
        "lerobot.policies.rtc.configuration_rtc": {"RTCConfig": RTCConfig},
    }
    for name, names in contents.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        setitem(name, module)
    installed = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "lerobot" else installed(name)
