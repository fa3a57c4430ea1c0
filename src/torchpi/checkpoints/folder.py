"""Our own format: a policy is a folder that needs nothing else.

policy.json         everything but the numbers: model config, embodiment, normalization, prompt, provenance
norm_stats.json     in openpi's layout
tokenizer.model     or tokenizer.json
model.safetensors   the weights, or shards of them with model.safetensors.index.json
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
_OPTIONAL = {"num_steps": 10, "prompt.state_dim": None, "image_transform.bars": -1}
_OPTIONAL |= {"trained_action_dim": None, "quantization": None}
"""Values of fields that are left out where they have them."""


@dataclasses.dataclass(frozen=True)
class PromptRules:
    """Rules of a prompt's tokens; the model's discrete_state_input decides whether the state is in it."""

    default: str | None
    format: str
    truncation: str
    state_dim: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    """Dimensions of the state in the prompt, zeros behind the robot's; stated where they are not the robot's own."""


@dataclasses.dataclass(frozen=True)
class NormalizationRules:
    """Normalization of state and actions."""

    state: Normalization
    actions: Normalization


@dataclasses.dataclass(frozen=True)
class PolicyFile:
    """The document policy.json. `docs/policy_folder.md` describes the fields."""

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
    """Euler steps of an inference that does not ask for another number; stated where it is not 10."""
    trained_action_dim: int | None = None
    """See `Pi0.trained_action_dim`; only where it is less than the model's action_dim."""
    quantization: Quantization | None = None
    """Only, and always, in a quantized policy, whose format_version is 3."""


def is_policy_folder(root: pathlib.Path) -> bool:
    return (root / "policy.json").is_file()


def check_target(path: str | pathlib.Path, *, overwrite: bool) -> pathlib.Path:
    """The folder that a policy is to be written to; an error if something is there that is not to be replaced."""
    target = pathlib.Path(path).expanduser()
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already; choose another path, or pass overwrite=True.")
    if target.exists() and not is_policy_folder(target):
        raise CheckpointError(f"{target} exists and is no policy folder; it is not overwritten.")
    return target


def read_policy_file(root: pathlib.Path) -> tuple[PolicyFile, Pi0Config]:
    """Read and check policy.json, but for the embodiment."""
    file = root / "policy.json"
    document = read_json_object(file, error=CheckpointError)
    version = document.get("format_version")
    if version == 1 and isinstance(document.get("prompt"), dict):  # there was one format then
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
    if (policy.quantization is not None) != (version == QUANTIZED_FORMAT_VERSION):
        raise CheckpointError(
            f"{file}: format_version is {version}, and quantization is {'missing' if version == 3 else 'stated'}; it "
            f"belongs to format_version {QUANTIZED_FORMAT_VERSION}."
        )
    stated = {**_stated(policy), "model": config.to_dict()}
    require_stated(document, stated, str(file), error=CheckpointError)
    if "max_given_actions" in policy.metadata:  # its name until 0.1
        policy.metadata[MAX_ACTION_PREFIX] = policy.metadata.pop("max_given_actions")
    return policy, config


def read_spec(root: pathlib.Path, policy: PolicyFile) -> PolicySpec:
    where = f"{root / 'policy.json'}: embodiment"
    robot = Embodiment.from_dict(policy.embodiment, where=where)
    stated = robot.to_dict()
    try:
        robot.check_names(where)
    except EmbodimentError as error:  # of an earlier version, and the weights are trained so
        warnings.warn(f"{error} The policy acts as it was trained.", UserWarning, stacklevel=2)
    if not any("command" in action for action in policy.embodiment["actions"]):
        robot = with_guessed_commands(robot)
        guessed = ", ".join(f"{action.name} {action.command}" for action in robot.actions)
        warnings.warn(
            f"{where} is of an older torchpi and does not say what its actions command, by which a robot is held "
            f"still; guessed from their names: {guessed}. "
            'State "command" (position, velocity, increment or effort) of each action.',
            UserWarning,
            stacklevel=2,
        )
        for action in stated["actions"]:
            del action["command"]
    require_stated(policy.embodiment, stated, where, error=CheckpointError)
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


def _stated(policy: PolicyFile) -> dict[str, Any]:
    document = dataclasses.asdict(policy)
    for path, default in _OPTIONAL.items():
        *inside, name = path.split(".")
        fields = document[inside[0]] if inside else document
        if fields[name] == default:
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
        write_json(root / "policy.json", _stated(policy))
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
    """Write a model's weights into a policy folder, by default each in its own dtype and all in one file; `read`
    returns a weight by its name, by default the model's."""
    if read is None and lora_config(model) is not None:
        raise CheckpointError(
            "A policy folder holds plain weights, and this model has LoRA: merge_lora folds it into the weights, "
            "save_adapter writes it on its own."
        )
    quantization = quantization_of(model)
    shapes = {name: array.shape for name, array in own_table(model.config, quantization).items()}
    dtypes = {name: dtype or model.get_parameter(name).dtype for name in shapes}
    scales = (name for name in shapes if name.endswith(".weight_scale"))
    dtypes |= {**(quantization.dtypes if quantization else {}), **dict.fromkeys(scales, torch.float32)}
    read = read or model.get_parameter
    write_safetensors(root, shapes, read, dtypes=dtypes, max_shard_bytes=max_shard_bytes)


def fingerprint(policy: Any) -> str:
    """SHA-256 of all that a policy is made of: its weights, and the files beside them."""
    weights = policy.model.state_dict()
    whole = hashlib.sha256(digest(weights, lambda name: weights[name].cpu()).encode())
    with tempfile.TemporaryDirectory() as beside:
        policy.write_spec(pathlib.Path(beside))
        for file in sorted(pathlib.Path(beside).iterdir()):
            whole.update(file.read_bytes())
    return whole.hexdigest()
