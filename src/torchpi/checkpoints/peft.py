"""LoRA adapters of PEFT, as LeRobot saves them, folded into the arrays of their base as these are read."""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchpi.checkpoints.fields import require_fields
from torchpi.checkpoints.layout import StoredArrays
from torchpi.checkpoints.openpi_torch import EXPERT_LM_HEAD, LEROBOT_PREFIX, TIED_EMBEDDING
from torchpi.checkpoints.safetensors_files import SafetensorsArrays
from torchpi.errors import CheckpointError
from torchpi.schema import read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIRS = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_peft(root: pathlib.Path) -> bool:
    """True if a folder has an adapter of PEFT."""
    return (root / CONFIG).is_file()


def read_adapter_config(root: pathlib.Path, policy: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """adapter_config.json, checked, and the address of the base that it, or else config.json, names."""
    document = read_json_object(root / CONFIG, error=CheckpointError)
    require_fields(f"lerobot: {CONFIG}", document, root / CONFIG)
    for number in ("r", "lora_alpha"):
        if isinstance(value := document.get(number), bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{root / CONFIG}: {number} is {value!r}; expected a positive number.")
    name = str(document.get("base_model_name_or_path") or policy.get("pretrained_path") or "")
    if not name:
        raise CheckpointError(
            f"{root / CONFIG} does not name the base that the adapter belongs to; write its folder, or its repository "
            "on the Hugging Face Hub, into base_model_name_or_path."
        )
    for folder in (pathlib.Path(name).expanduser(), root / name):
        if folder.exists():
            return document, str(folder)
    revision = f"@{document['revision']}" if document.get("revision") else ""
    return document, f"hf://{name}{revision}" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) else name


class PeftArrays:
    """The arrays of a base by openpi's names, with an adapter's changes; see `StoredArrays`."""

    dtype = torch.float32
    """The changes are float32, whatever the base is stored in."""

    def __init__(self, root: pathlib.Path, config: Mapping[str, Any], base: StoredArrays) -> None:
        """Match the adapter's arrays with the base's; each changes or replaces one."""
        self._stored, self._base = SafetensorsArrays(root, WEIGHTS), base
        self.source, self.shapes = self._stored.source, base.shapes
        self.folded: dict[str, tuple[str, str]] = {}
        """By the array of the base that they change, the names of A and B."""
        self.dropped: dict[str, str] = {}
        """Arrays that are not read, and why."""
        self._scales: dict[str, float] = {}
        self._replaced: dict[str, str] = {}
        pairs: dict[str, dict[str, str]] = {}
        for name in self._stored.shapes:
            if found := _PAIRS.fullmatch(name):
                pairs.setdefault(found[1].removeprefix(_PREFIX), {})[found[2]] = name
            else:
                self._replaced[_openpi_name(name)] = name
        for layer, pair in pairs.items():
            weight = f"{_openpi_name(layer)}.weight"
            if weight in (EXPERT_LM_HEAD, TIED_EMBEDDING):
                self.dropped |= dict.fromkeys(pair.values(), "they change a text head, which is not read")
                continue
            self._scales[weight] = self._scale(layer, weight, pair, config)
            self.folded[weight] = pair["A"], pair["B"]
        if unfit := [n for name, n in self._replaced.items() if self._stored.shapes[n] != base.shapes.get(name)]:
            raise CheckpointError(f"{self.source} has arrays that fit none of the base's: {', '.join(unfit[:8])}.")
        saved = config.get("modules_to_save") or []
        if missing := [m for m in saved if not any(f".{m}." in f".{name}" for name in self._replaced)]:
            raise CheckpointError(f"{self.source} lacks {', '.join(missing)}, which {CONFIG} names; get it again.")

    def _scale(self, layer: str, weight: str, pair: Mapping[str, str], config: Mapping[str, Any]) -> float:
        """The factor of B·A, after a check that they fit the weight and adapter_config.json."""
        a, b = (self._stored.shapes.get(pair.get(half, ""), ()) for half in "AB")
        out, *inputs = self.shapes.get(weight, ())
        rank = _of_layer(layer, config.get("rank_pattern"), config["r"])
        if (a, b) != ((rank, *inputs), (out, rank)) or len(inputs) != 1:
            raise CheckpointError(
                f"{self.source}: A {list(a)} and B {list(b)} of {layer} do not fit rank {rank}, which {CONFIG} states, "
                f"and the base's {weight} {list(self.shapes.get(weight, ()))}."
            )
        alpha = _of_layer(layer, config.get("alpha_pattern"), config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An array by openpi's name, with its change."""
        if name in self._replaced:
            return self._stored.read(self._replaced[name], dtype)
        if name not in self.folded:
            return self._base.read(name, dtype)
        a, b = (self._stored.read(part, torch.float32) for part in self.folded[name])
        return (b @ a).mul_(self._scales[name]).add_(self._base.read(name, torch.float32)).to(dtype or torch.float32)


def _openpi_name(name: str) -> str:
    name = re.sub(r"\.modules_to_save(\.default)?", "", name.removeprefix(_PREFIX))
    while name.startswith(LEROBOT_PREFIX):
        name = name.removeprefix(LEROBOT_PREFIX)
    return name


def _of_layer(layer: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of a layer: of the first of PEFT's patterns that its name ends with, or the default."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
