"""torchpi's own format: a self-contained policy folder.

policy.json         model config, embodiment, normalization rules, prompt format, provenance
norm_stats.json     statistics, in openpi's layout
tokenizer.model     or tokenizer.json
model.safetensors   weights, or shards with model.safetensors.index.json
"""

import dataclasses
import hashlib
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from torchpi.checkpoints.adapter import digest
from torchpi.checkpoints.layout import own_table
from torchpi.checkpoints.safetensors_files import write_safetensors
from torchpi.checkpoints.spec import MAX_ACTION_PREFIX, PolicySpec
from torchpi.config import Pi0Config
from torchpi.engine.quantize import Quantization, quantization_of
from torchpi.errors import CheckpointError, EmbodimentError
from torchpi.model.flow import check_num_steps
from torchpi.model.lora import lora_config
from torchpi.model.pi0 import Pi0
from torchpi.robots import Embodiment
from torchpi.robots.commands import with_guessed_commands
from torchpi.schema import check_json, parse, read_json_object, require_stated, write_json
from torchpi.transforms.images import ImageTransform
from torchpi.transforms.normalize import Normalization, load_norm_stats
from torchpi.version import __version__

FORMAT_VERSION, QUANTIZED_FORMAT_VERSION = 2, 3
_OMITTED = {"num_steps": 10, "trained_action_dim": None, "quantization": None}
_OMITTED |= {"prompt.state_dim": None, "image_transform.bars": -1}
"""Fields that are left out of the file if they have this value."""


@dataclasses.dataclass(frozen=True)
class PromptRules:
    """Format of the prompt; the model's discrete_state_input decides if it contains the state."""

    default: str | None
    format: str
    truncation: str
    state_dim: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    """Dimensions to which the state in the prompt is padded with zeros; None: no padding."""


@dataclasses.dataclass(frozen=True)
class NormalizationRules:
    """Normalization rules of state and actions."""

    state: Normalization
    actions: Normalization


@dataclasses.dataclass(frozen=True)
class PolicyFile:
    """Contents of policy.json; docs/policy_folder.md describes the fields."""

    format_version: int
    model: dict[str, Any]
    """`Pi0Config.to_dict`."""
    embodiment: dict[str, Any]
    """`Embodiment.to_dict`."""
    normalization: NormalizationRules
    prompt: PromptRules
    metadata: dict[str, Any]
    """Free, for clients."""
    provenance: dict[str, Any]
    """Origin of the weights."""
    image_transform: ImageTransform
    num_steps: int = 10
    """Default number of Euler steps."""
    trained_action_dim: int | None = None
    """See `Pi0.trained_action_dim`; None: all of action_dim."""
    quantization: Quantization | None = None
    """Set for quantized policies, with format_version 3."""


def is_policy_folder(root: pathlib.Path) -> bool:
    return (root / "policy.json").is_file()


def check_target(path: str | pathlib.Path, *, overwrite: bool) -> pathlib.Path:
    """Folder to write a policy to; raise an error if something exists there that must not be replaced."""
    target = pathlib.Path(path).expanduser()
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already; choose another path, or pass overwrite=True.")
    if target.exists() and not is_policy_folder(target):
        raise CheckpointError(f"{target} exists and is not a policy folder; it is not overwritten.")
    return target


def read_policy_file(root: pathlib.Path) -> tuple[PolicyFile, Pi0Config]:
    """Read and check policy.json, except the embodiment."""
    file = root / "policy.json"
    document = read_json_object(file, error=CheckpointError)
    version = document.get("format_version")
    if version == 1 and isinstance(document.get("prompt"), dict):  # it had only one prompt format
        document["prompt"].setdefault("format", "openpi")
    elif version not in (FORMAT_VERSION, QUANTIZED_FORMAT_VERSION):
        raise CheckpointError(
            f"{file}: format_version is {version!r}; this torchpi reads 1, {FORMAT_VERSION} and "
            f"{QUANTIZED_FORMAT_VERSION}. A newer file needs a newer torchpi."
        )
    check_json(document, str(file), error=CheckpointError)
    policy = parse(PolicyFile, document, str(file), error=CheckpointError)
    check_num_steps(policy.num_steps, f"{file}: ")
    config = Pi0Config.from_dict(policy.model, where=f"{file}: model")
    if policy.trained_action_dim is not None and not 0 <= policy.trained_action_dim < config.action_dim:
        raise CheckpointError(
            f"{file}: trained_action_dim is {policy.trained_action_dim}; expected less than action_dim "
            f"{config.action_dim}, or no such field where all actions are trained."
        )
    is_quantized = policy.quantization is not None
    if is_quantized != (version == QUANTIZED_FORMAT_VERSION):
        raise CheckpointError(
            f"{file}: format_version is {version}, and quantization is {'stated' if is_quantized else 'missing'}; "
            f"quantization belongs to format_version {QUANTIZED_FORMAT_VERSION}."
        )
    expected = {**_document(policy), "model": config.to_dict()}
    require_stated(document, expected, str(file), error=CheckpointError)
    if "max_given_actions" in policy.metadata:  # the name before 0.1
        policy.metadata[MAX_ACTION_PREFIX] = policy.metadata.pop("max_given_actions")
    return policy, config


def read_spec(root: pathlib.Path, policy: PolicyFile) -> PolicySpec:
    where = f"{root / 'policy.json'}: embodiment"
    robot = Embodiment.from_dict(policy.embodiment, where=where)
    expected = robot.to_dict()
    try:
        robot.check_names(where)
    except EmbodimentError as error:  # earlier versions allowed such names, and the weights were trained with them
        warnings.warn(f"{error} The policy acts as it was trained.", UserWarning, stacklevel=2)
    if not any("command" in action for action in policy.embodiment["actions"]):
        robot = with_guessed_commands(robot)
        guessed = ", ".join(f"{action.name} {action.command}" for action in robot.actions)
        warnings.warn(
            f"{where} was written by an older torchpi and does not state the command of each action, which is needed "
            f'to hold a robot still; guessed from the names: {guessed}. State "command" (position, velocity, increment '
            "or effort) of each action.",
            UserWarning,
            stacklevel=2,
        )
        for action in expected["actions"]:
            del action["command"]
    require_stated(policy.embodiment, expected, where, error=CheckpointError)
    return PolicySpec(
        source=str(root),
        embodiment=robot,
        norm_stats=load_norm_stats(root),
        normalization=vars(policy.normalization),
        tokenizer=tokenizer_file(root),
        prompt_format=policy.prompt.format,
        truncation=policy.prompt.truncation,
        prompt_state_dim=policy.prompt.state_dim,
        image_transform=policy.image_transform,
        num_steps=policy.num_steps,
        default_prompt=policy.prompt.default,
        metadata=policy.metadata,
        provenance=policy.provenance,
        is_policy_folder=True,
    )


def _document(policy: PolicyFile) -> dict[str, Any]:
    document = dataclasses.asdict(policy)
    for path, value in _OMITTED.items():
        *parents, name = path.split(".")
        fields = document[parents[0]] if parents else document
        if fields[name] == value:
            del fields[name]
    return document


def write_policy_file(root: pathlib.Path, model: Pi0, spec: PolicySpec) -> None:
    trained, quantization = model.trained_action_dim, quantization_of(model)
    assert spec.embodiment is not None
    assert spec.normalization is not None
    policy = PolicyFile(
        format_version=FORMAT_VERSION if quantization is None else QUANTIZED_FORMAT_VERSION,
        model=model.config.to_dict(),
        embodiment=spec.embodiment.to_dict(),
        normalization=NormalizationRules(**spec.normalization),
        prompt=PromptRules(spec.default_prompt, spec.prompt_format, spec.truncation, spec.prompt_state_dim),
        metadata=dict(spec.metadata),
        provenance={"torchpi": __version__, **spec.provenance},
        image_transform=spec.image_transform,
        num_steps=spec.num_steps,
        trained_action_dim=trained if trained < model.config.action_dim else None,
        quantization=quantization,
    )
    try:
        write_json(root / "policy.json", _document(policy))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"metadata or provenance of the policy can't be written as JSON: {error}.") from error


def tokenizer_file(root: pathlib.Path) -> pathlib.Path | None:
    files = (root / "tokenizer.model", root / "tokenizer.json")
    return next((file for file in files if file.is_file()), None)


def write_weights(
    root: pathlib.Path,
    model: Pi0,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a model's weights into a policy folder.

    Args:
        dtype: dtype of all arrays; by default each keeps its own.
        max_shard_bytes: split into shards above this size; by default one file.
        read: returns a weight by its name; by default the model's.
    """
    if read is None and lora_config(model) is not None:
        raise CheckpointError(
            "A policy folder can't hold LoRA weights, which this model has: merge them with merge_lora, or write them "
            "separately with save_adapter."
        )
    quantization = quantization_of(model)
    shapes = {name: array.shape for name, array in own_table(model.config, quantization).items()}
    dtypes = {name: dtype or model.get_parameter(name).dtype for name in shapes}
    scales = (name for name in shapes if name.endswith(".weight_scale"))
    dtypes |= {**(quantization.dtypes if quantization else {}), **dict.fromkeys(scales, torch.float32)}
    read = read or model.get_parameter
    write_safetensors(root, shapes, read, dtypes=dtypes, max_shard_bytes=max_shard_bytes)


def fingerprint(policy: Any) -> str:
    """SHA-256 of a policy's weights and all other files of its folder."""
    weights = policy.model.state_dict()
    sha256 = hashlib.sha256(digest(weights, lambda name: weights[name].cpu()).encode())
    with tempfile.TemporaryDirectory() as temporary:
        policy.write_spec(pathlib.Path(temporary))
        for file in sorted(pathlib.Path(temporary).iterdir()):
            sha256.update(file.read_bytes())
    return sha256.hexdigest()
