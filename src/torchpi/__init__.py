"""π₀ and π₀.₅ in plain PyTorch: run, trace, fine-tune, serve and evaluate them.

Public names are imported on first use: `import torchpi` is cheap, and the modules that don't need torch
(`torchpi.transforms`, `torchpi.robots`) work without it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from torchpi.version import __version__ as __version__

if TYPE_CHECKING:
    from torchpi.checkpoints import load_model as load_model
    from torchpi.config import GemmaConfig as GemmaConfig
    from torchpi.config import Pi0Config as Pi0Config
    from torchpi.config import VisionConfig as VisionConfig
    from torchpi.model.pi0 import Pi0 as Pi0
    from torchpi.policy import Policy as Policy
    from torchpi.policy import load_policy as load_policy
    from torchpi.robots import Embodiment as Embodiment
    from torchpi.types import ActionChunk as ActionChunk
    from torchpi.types import Observation as Observation

_MODULES = {
    "ActionChunk": "torchpi.types",
    "Embodiment": "torchpi.robots",
    "GemmaConfig": "torchpi.config",
    "Observation": "torchpi.types",
    "Pi0": "torchpi.model.pi0",
    "Pi0Config": "torchpi.config",
    "Policy": "torchpi.policy",
    "VisionConfig": "torchpi.config",
    "load_model": "torchpi.checkpoints",
    "load_policy": "torchpi.policy",
}

__all__ = list(_MODULES)

# Submodules that import the others of their package, so that `torchpi.model.masks.make_attn_mask` works after a bare
# `import torchpi`.
_PACKAGE_ENTRY = {"model": "torchpi.model.pi0", "transforms": "torchpi.transforms.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name.startswith("_") or importlib.util.find_spec(f"torchpi.{name}") is None:
        raise AttributeError(f"module 'torchpi' has no attribute {name!r}")
    importlib.import_module(_PACKAGE_ENTRY.get(name, f"torchpi.{name}"))
    return importlib.import_module(f"torchpi.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
