"""PEFT's LoRA adapters, as LeRobot saves them, merged into the arrays of their base while these are read."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchpi.checkpoints.fields import require_fields
from torchpi.checkpoints.layout import StoredArrays
from torchpi.checkpoints.openpi_torch import EXPERT_LM_HEAD, LEROBOT_PREFIX, TIED_EMBEDDING
from torchpi.checkpoints.safetensors_files import SafetensorsArrays
from torchpi.errors import CheckpointError
from torchpi.schema import parse, read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIRS = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_MATCH = """
import json, re, sys
keys, layers = json.load(sys.stdin)
found = [next((key for key in keys if re.match(rf"(.*\\.)?({key})$", layer)), None) for layer in layers]
json.dump(found, sys.stdout)
"""
"""Program that applies PEFT's rule: a layer has the first pattern that matches the end of its name."""
_MATCH_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Fields of adapter_config.json that torchpi uses."""

    r: int
    lora_alpha: float
    base_model_name_or_path: str | None = None
    revision: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        numbers = (self.r, self.lora_alpha, *(self.rank_pattern or {}).values(), *(self.alpha_pattern or {}).values())
        if invalid := [number for number in numbers if not 0 < number < math.inf]:
            raise CheckpointError(f"A rank or an alpha is {invalid[0]}; expected positive numbers.")


def is_peft(root: pathlib.Path) -> bool:
    return (root / CONFIG).is_file()


def read_adapter_config(root: pathlib.Path, policy: Mapping[str, Any]) -> tuple[AdapterConfig, str]:
    """Read adapter_config.json; also return the address of the base, which it or config.json names."""
    document = read_json_object(root / CONFIG, error=CheckpointError)
    require_fields(f"lerobot: {CONFIG}", document, root / CONFIG)
    config = parse(AdapterConfig, document, str(root / CONFIG), error=CheckpointError, known_only=False)
    name = str(config.base_model_name_or_path or policy.get("pretrained_path") or "")
    if not name:
        raise CheckpointError(
            f"{root / CONFIG} does not name the adapter's base; write its folder, or its repository on the Hugging "
            "Face Hub, into base_model_name_or_path."
        )
    for folder in (os.path.expanduser(name), str(root / name)):
        if os.path.exists(folder):
            return config, folder
    revision = f"@{config.revision}" if config.revision else ""
    return config, f"hf://{name}{revision}" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) else name


class PeftArrays:
    """Arrays of a base by openpi's names, with an adapter merged into them; see `StoredArrays`."""

    def __init__(self, root: pathlib.Path, config: AdapterConfig, base: StoredArrays) -> None:
        """Match the adapter's arrays with the base's; each updates or replaces one."""
        self._stored, self.base = SafetensorsArrays(root, WEIGHTS), base
        self.source, self.shapes = self._stored.source, base.shapes
        self.folded: dict[str, tuple[str, str]] = {}
        """Names of A and B, by the array of the base that they update."""
        self.dropped: dict[str, str] = {}
        """Arrays that are not read, each with the reason."""
        self._scales: dict[str, float] = {}
        self._replaced: dict[str, str] = {}
        pairs: dict[str, dict[str, str]] = {}
        for name in self._stored.shapes:
            if match := _PAIRS.fullmatch(name):
                pairs.setdefault(match[1].removeprefix(_PREFIX), {})[match[2]] = name
            else:
                self._replaced[_openpi_name(name)] = name
        ranks = _match_patterns(pairs, config.rank_pattern, config.r, self.source)
        alphas = _match_patterns(pairs, config.alpha_pattern, config.lora_alpha, self.source)
        for layer, pair in pairs.items():
            weight = f"{_openpi_name(layer)}.weight"
            if weight in (EXPERT_LM_HEAD, TIED_EMBEDDING):
                self.dropped |= dict.fromkeys(pair.values(), "they update a text head, which is not read")
                continue
            self._require_fit(layer, weight, pair, ranks[layer])
            self._scales[weight] = alphas[layer] / (math.sqrt(ranks[layer]) if config.use_rslora else ranks[layer])
            self.folded[weight] = pair["A"], pair["B"]
        self._require_consistent(config)
        replaced = {name: self._stored.dtypes[stored] for name, stored in self._replaced.items()}
        self.dtypes = {**base.dtypes, **dict.fromkeys(self.folded, torch.float32), **replaced}

    def _require_consistent(self, config: AdapterConfig) -> None:
        """Check that each array is used once, and that replaced arrays fit the base and are complete."""
        used = {*self.dropped, *self._replaced.values(), *(name for pair in self.folded.values() for name in pair)}
        if not used:
            raise CheckpointError(f"{self.source} has no arrays; get it again.")
        if conflicts := [*(self._stored.shapes.keys() - used), *(self.folded.keys() & self._replaced.keys())]:
            raise CheckpointError(
                f"{self.source} has {conflicts[0]} and a second change of the same array; get it again."
            )
        shapes, base_shapes = self._stored.shapes, self.base.shapes
        if misfits := [stored for name, stored in self._replaced.items() if shapes[stored] != base_shapes.get(name)]:
            raise CheckpointError(f"{self.source} has arrays that fit none of the base's: {', '.join(misfits[:8])}.")
        modules = config.modules_to_save or ()
        if missing := [m for m in modules if not any(f".{m}." in f".{name}" for name in self._replaced)]:
            raise CheckpointError(f"{self.source} lacks {', '.join(missing)}, which {CONFIG} names; get it again.")

    def _require_fit(self, layer: str, weight: str, pair: Mapping[str, str], rank: int) -> None:
        a, b = (self._stored.shapes.get(pair.get(half, ""), ()) for half in "AB")
        out, *inputs = self.shapes.get(weight, ())
        if (a, b) != ((rank, *inputs), (out, rank)) or len(inputs) != 1:
            raise CheckpointError(
                f"{self.source}: A {list(a)} and B {list(b)} of {layer} do not fit rank {rank}, which {CONFIG} states, "
                f"and the base's {weight} {list(self.shapes.get(weight, ()))}."
            )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read an array by openpi's name, with the adapter merged into it; updated arrays are float32 by default."""
        if name in self._replaced:
            return self._stored.read(self._replaced[name], dtype)
        if name not in self.folded:
            return self.base.read(name, dtype)
        a, b = (self._stored.read(part, torch.float32) for part in self.folded[name])
        return (b @ a).mul_(self._scales[name]).add_(self.base.read(name, torch.float32)).to(dtype or torch.float32)


def _openpi_name(name: str) -> str:
    name = re.sub(r"\.modules_to_save(\.default)?", "", name.removeprefix(_PREFIX))
    while name.startswith(LEROBOT_PREFIX):
        name = name.removeprefix(LEROBOT_PREFIX)
    return name


def _match_patterns(
    layers: Iterable[str], patterns: Mapping[str, Any] | None, default: Any, source: pathlib.Path
) -> dict[str, Any]:
    """Value of each layer by the regular expressions in a checkpoint.

    Untrusted expressions may take forever, so they are matched in a process with a time limit.
    """
    names = list(layers)
    if not patterns or not names:
        return dict.fromkeys(names, default)
    command, texts = [sys.executable, "-I", "-c", _MATCH], json.dumps([[*patterns], names])
    try:
        process = subprocess.run(
            command, input=texts, capture_output=True, text=True, check=True, timeout=_MATCH_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        timed_out = isinstance(error, subprocess.TimeoutExpired)
        reason = "that takes too long" if timed_out else str(error.stderr).strip().rpartition("\n")[2]
        raise CheckpointError(
            f"{source.with_name(CONFIG)}: the patterns {', '.join(patterns):.200} can't be matched with the layers: "
            f"{reason}. Write the layers' names there."
        ) from error
    return {name: patterns.get(key, default) for name, key in zip(names, json.loads(process.stdout), strict=True)}
