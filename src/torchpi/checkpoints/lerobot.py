"""LeRobot's π₀ and π₀.₅ policies: what is around the weights, read and written.

config.json has the sizes and the features, policy_preprocessor.json and policy_postprocessor.json the steps around the
model, each with its settings; the statistics lie in safetensors files that the steps name.

Source: LeRobot 0.6's processors.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from torchpi.checkpoints.folder import tokenizer_file
from torchpi.checkpoints.spec import PolicySpec
from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError, MissingFileError
from torchpi.robots import ActionDim, Camera, Embodiment, StateKey
from torchpi.schema import parse, read_json, write_json
from torchpi.transforms.normalize import Normalization, NormStats

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
EMPTY_CAMERA = f"{IMAGES}empty_camera_"
TOKENIZER = "tokenizer"
EPS = 1e-8

# Steps that change nothing of a sample that is not changed here as well: batch axis, device, and the prompt's text and
# tokens, whose formats follow the policy's type.
_NEUTRAL = {
    "to_batch_processor",
    "device_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
}
_BEFORE = _NEUTRAL | {
    "rename_observations_processor",
    "relative_actions_processor",
    "normalizer_processor",
    "tokenizer_processor",
}
_AFTER = _NEUTRAL | {"unnormalizer_processor", "absolute_actions_processor"}
_BOUNDS = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}


@dataclasses.dataclass(frozen=True)
class _Step:
    registry_name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    state_file: str | None = None
    artifacts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Processor:
    steps: list[_Step]


def read_spec(root: pathlib.Path, document: Mapping[str, Any]) -> PolicySpec:
    """Everything around the model of the LeRobot policy in a folder, whose config.json is `document`."""
    before, after = _steps(root / PREPROCESSOR, _BEFORE), _steps(root / POSTPROCESSOR, _AFTER)
    absent = _Step("")
    try:
        normalizer, unnormalizer = before["normalizer_processor"], after["unnormalizer_processor"]
        tokens = before["tokenizer_processor"]
        relative = before.get("relative_actions_processor", absent).config
        renamed = before.get("rename_observations_processor", absent).config.get("rename_map", {})
        embodiment = _embodiment(document, relative, renamed)
        stats, rules = {}, {}
        for key, feature, step in (("state", STATE, normalizer), ("actions", ACTION, unnormalizer)):
            stats[key], rules[key] = _normalization(root, step, feature)
        length = int(tokens.config["max_length"])
        tokenizer = str(tokens.artifacts.get("tokenizer_name") or tokens.config.get("tokenizer_name", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The processors of {root} are not as LeRobot writes them: no {error}") from error
    if length != document.get("tokenizer_max_length"):
        raise CheckpointError(
            f"{root}: the tokenizer's step has max_length {length}, config.json tokenizer_max_length "
            f"{document.get('tokenizer_max_length')}; correct one of them."
        )
    inside = root.resolve() in (root / tokenizer).resolve().parents  # else the name of PaliGemma's on a hub
    return PolicySpec(
        source=str(root),
        embodiment=embodiment,
        norm_stats=stats,
        normalization=rules,
        tokenizer=tokenizer_file(root / tokenizer) if inside else None,
        prompt_format="lerobot",
    )


def _steps(file: pathlib.Path, known: set[str]) -> dict[str, _Step]:
    if not file.is_file():
        raise MissingFileError(
            f"{file} does not exist; a LeRobot policy since version 0.4 has it. Migrate an older one with LeRobot's "
            "own script."
        )
    document = read_json(file, error=CheckpointError)
    where = f"{file} is not as LeRobot writes it"
    processor = parse(_Processor, document, where, error=CheckpointError, known_only=False)
    if unknown := sorted({step.registry_name for step in processor.steps} - known):
        raise CheckpointError(
            f"{file} has steps that are not known here: {', '.join(unknown)}; known are {sorted(known)}."
        )
    return {step.registry_name: step for step in processor.steps}


def _embodiment(document: Mapping[str, Any], relative: Mapping[str, Any], renamed: Mapping[str, str]) -> Embodiment:
    robots_name = {theirs: robots for robots, theirs in renamed.items()}
    inputs, output = document["input_features"], document["output_features"][ACTION]
    cameras = []
    for key in (key for key, feature in inputs.items() if feature["type"] == "VISUAL"):
        name = key.removeprefix(IMAGES)
        if key.startswith(EMPTY_CAMERA):
            cameras.append(Camera(name, None, "masked"))
        else:  # LeRobot masks whichever is missing, as long as one is there
            cameras.append(Camera(name, robots_name.get(key, key), "optional", layout="chw", dtype="any"))
    num_actions, num_states = output["shape"][0], inputs[STATE]["shape"][0]
    stated = relative.get("action_names") or document.get("action_feature_names") or []
    names = [str(stated[i]) if i < len(stated) else f"action_{i}" for i in range(num_actions)]
    # Without names nothing can be excluded there.
    tokens = relative.get("exclude_joints") if relative.get("action_names") else None
    excluded = [str(token).lower() for token in tokens or [] if token]
    enabled = bool(relative.get("enabled"))
    kinds = {True: "delta", False: "absolute"}
    actions = [ActionDim(n, kind=kinds[enabled and not any(part in n.lower() for part in excluded)]) for n in names]
    return Embodiment(
        "lerobot",
        cameras=tuple(cameras),
        state=(StateKey(robots_name.get(STATE, STATE), tuple(f"state_{i}" for i in range(num_states))),),
        actions=tuple(actions),
        execute_steps=document.get("n_action_steps"),
    )


def _normalization(root: pathlib.Path, step: _Step, feature: str) -> tuple[NormStats, Normalization]:
    config = step.config
    if config["eps"] != EPS:
        raise CheckpointError(f"{root}: the normalization's eps is {config['eps']}; LeRobot's {EPS} is known here.")
    mode = config["norm_map"].get(config["features"][feature]["type"], "IDENTITY")
    selected = config.get("normalize_observation_keys")
    if feature == STATE and selected is not None and STATE not in selected:
        mode = "IDENTITY"
    arrays = _statistics(root, step)
    found = {name.removeprefix(f"{feature}."): a for name, a in arrays.items() if name.startswith(f"{feature}.")}
    if mode == "IDENTITY" or not found:  # without statistics LeRobot leaves the values as they are
        dim = config["features"][feature]["shape"][0]
        return NormStats(np.zeros(dim), np.ones(dim)), Normalization("identity", "lerobot")
    if mode not in ("MEAN_STD", *_BOUNDS):
        raise CheckpointError(
            f"{root}: normalization {mode} is not known here; known are MEAN_STD, {', '.join(_BOUNDS)}."
        )
    low, high = _BOUNDS.get(mode, ("q01", "q99"))
    if missing := sorted({"mean", "std", *((low, high) if mode in _BOUNDS else ())} - set(found)):
        raise CheckpointError(f"{root}: the statistics of {feature} have no {', '.join(missing)}, which {mode} needs.")
    # The three kinds of bounds are one formula; whichever a policy has are its q01 and q99 here.
    stats = NormStats(mean=found["mean"], std=found["std"], q01=found.get(low), q99=found.get(high))
    return stats, Normalization("quantile" if mode in _BOUNDS else "z_score", "lerobot")


def _statistics(root: pathlib.Path, step: _Step) -> dict[str, Any]:
    name = step.state_file
    if name is None:
        return {}
    if pathlib.PurePath(name).name != name:
        raise CheckpointError(f"{root}: a processor names the file {name!r}; only files next to it are read.")
    file = root / name
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; the policy's statistics are expected there.")
    try:
        return dict(safetensors.numpy.load_file(file))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}; get the file again.") from error


# ---- writing ----


def write_spec(root: pathlib.Path, config: Pi0Config, spec: PolicySpec, dtype: torch.dtype) -> list[str]:
    """Write config.json and both processors with their statistics, as LeRobot 0.6 does; notes on what it does
    differently with this policy. The tokenizer is expected in the folder `TOKENIZER` beside them."""
    robot, stats, rules = spec.embodiment, spec.norm_stats, spec.normalization
    assert robot is not None
    assert stats is not None
    assert rules is not None
    if robot.hook is not None:
        raise CheckpointError(
            f"embodiment {robot.name!r} converts units by the code {robot.hook!r}, which no step of LeRobot does; "
            "convert with an embodiment of the model's own units."
        )
    if not robot.state:
        raise CheckpointError(f"{robot.name} has no state, and LeRobot's policies read one; it can't be converted.")
    if depths := [str(camera.key) for camera in robot.read_cameras if camera.depth is not None]:
        raise CheckpointError(
            f"embodiment {robot.name!r} maps the depth of {', '.join(depths)} to colours, which no step of LeRobot "
            "does; convert with an embodiment that is sent the colours."
        )
    if config.discrete_state_input not in (None, config.pi05):
        raise CheckpointError(
            f"discrete_state_input is {config.discrete_state_input}: LeRobot always has the state in π₀.₅'s prompt and "
            "never in π₀'s, so the policy would read another prompt there."
        )
    features, renamed = _features(robot, config, stats["state"].dim)
    modes = {"z_score": "MEAN_STD", "quantile": "QUANTILES", "identity": "IDENTITY"}
    norm_map = {"VISUAL": "IDENTITY", "STATE": modes[rules["state"].kind], "ACTION": modes[rules["actions"].kind]}
    scaling = {"eps": EPS, "features": features, "norm_map": norm_map}
    relative = _relative(robot)
    arrays = {
        f"{feature}.{name}": value[:dim].astype(np.float32)
        for key, feature, dim in (("state", STATE, robot.state_dims[-1]), ("actions", ACTION, robot.action_size))
        for name, value in vars(stats[key]).items()
        if value is not None
    }
    before, after = _written_steps(config, renamed, scaling, relative)
    for file, steps in ((PREPROCESSOR, before), (POSTPROCESSOR, after)):
        for step in steps:
            if "state_file" in step:
                safetensors.numpy.save_file(arrays, root / step["state_file"])
        write_json(root / file, {"name": file.removesuffix(".json"), "steps": steps})
    write_json(root / "config.json", _document(config, robot, scaling, relative, dtype))
    return _notes(config, spec, robot, renamed)


def _notes(config: Pi0Config, spec: PolicySpec, robot: Embodiment, renamed: Mapping[str, str]) -> list[str]:
    notes = ["rates, names, units, commands and limits of the robot are not written: LeRobot has no place for them"]
    state = robot.state
    if robots_own := [key for key in renamed if not key.startswith("observation.")]:
        notes.append(
            f"send LeRobot its own names ({IMAGES}…, {STATE}): it drops {', '.join(robots_own)} before it renames"
        )
    if len(state) > 1:
        keys = ", ".join(part.key for part in state)
        notes.append(f"the state is one vector there: send {keys} one behind the other as {STATE}")
    if any(rule.eps_rule != "lerobot" and rule.kind != "identity" for rule in (spec.normalization or {}).values()):
        notes.append("normalization has LeRobot's eps there: about 1e-6 of a deviation or range less")
    if not config.pi05 and spec.prompt_format != "lerobot":
        notes.append("the prompt is not cleaned there, and its newline is tokenized with it")
    return notes


def _written_steps(
    config: Pi0Config, renamed: Mapping[str, str], scaling: Mapping[str, Any], relative: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps before and after the model."""

    def step(name: str, **settings: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": settings}

    rename, to_batch = step("rename_observations_processor", rename_map=renamed), step("to_batch_processor")
    device = step("device_processor", device="cpu", float_dtype=None)
    padding = {"padding_side": "right", "padding": "max_length", "truncation": True}
    tokens = step("tokenizer_processor", max_length=config.require("max_token_len"), task_key="task", **padding)
    tokens["config"]["tokenizer_name"] = TOKENIZER
    tokens["artifacts"] = {"tokenizer_name": TOKENIZER}
    to_relative = step("relative_actions_processor", **relative)
    normalizer = step("normalizer_processor", **scaling)
    if config.pi05:
        text = step("pi05_prepare_state_tokenizer_processor_step")
        before = [rename, to_batch, to_relative, normalizer, text, tokens, device]
    else:
        before = [rename, to_batch, step("pi0_new_line_processor"), tokens, device, to_relative, normalizer]
    normalizer["state_file"] = f"policy_preprocessor_step_{before.index(normalizer)}_normalizer_processor.safetensors"
    unnormalizer = step("unnormalizer_processor", **{**scaling, "features": {ACTION: scaling["features"][ACTION]}})
    unnormalizer["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    return before, [unnormalizer, step("absolute_actions_processor", enabled=relative["enabled"]), device]


def _features(robot: Embodiment, config: Pi0Config, state_dim: int) -> tuple[dict[str, Any], dict[str, str]]:
    """LeRobot's features in the model's order, and the map from the robot's keys to them."""
    size, empty = config.image_size, itertools.count()
    features: dict[str, Any] = {}
    renamed = {}
    for camera in robot.read_cameras:
        key = f"{EMPTY_CAMERA}{next(empty)}" if camera.key is None else f"{IMAGES}{camera.name}"
        features[key] = {"type": "VISUAL", "shape": [3, size, size]}
        if camera.key not in (None, key):
            renamed[camera.key] = key
    features[STATE] = {"type": "STATE", "shape": [min(state_dim, robot.state_dims[-1])]}
    if len(robot.state) == 1 and robot.state[0].key != STATE:
        renamed[robot.state[0].key] = STATE
    features[ACTION] = {"type": "ACTION", "shape": [robot.action_size]}
    return features, renamed


def _relative(robot: Embodiment) -> dict[str, Any]:
    names = list(robot.action_names)
    excluded = [action.name for action in robot.actions if action.kind == "absolute"]
    enabled = any(robot.action_mask)
    # LeRobot leaves out every action whose name contains one of these.
    wrong = [a.name for a in robot.actions if a.kind == "delta" and any(e.lower() in a.name.lower() for e in excluded)]
    if enabled and wrong:
        raise CheckpointError(
            f"LeRobot tells relative actions from others by parts of their names, and {', '.join(wrong)} contains one "
            f"of {', '.join(excluded)}; rename the actions of the embodiment."
        )
    return {"enabled": enabled, "exclude_joints": excluded if enabled else ["gripper"], "action_names": names}


def _document(
    config: Pi0Config, robot: Embodiment, scaling: Mapping[str, Any], relative: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    features, horizon = scaling["features"], config.require("action_horizon")
    return {
        "type": "pi05" if config.pi05 else "pi0",
        "n_obs_steps": 1,
        "input_features": {key: value for key, value in features.items() if key != ACTION},
        "output_features": {ACTION: features[ACTION]},
        "device": "cpu",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": str(dtype).removeprefix("torch."),
        "chunk_size": horizon,
        "n_action_steps": min(robot.execute_steps or horizon, horizon),
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "use_relative_actions": relative["enabled"],
        "relative_exclude_joints": relative["exclude_joints"],
        "action_feature_names": relative["action_names"],
        "image_resolution": [config.image_size, config.image_size],
        "empty_cameras": sum(camera.key is None for camera in robot.read_cameras),
        "tokenizer_max_length": config.require("max_token_len"),
        "normalization_mapping": scaling["norm_map"],
    }


def write_tokenizer_config(root: pathlib.Path, special_tokens: Mapping[str, str]) -> None:
    """Write the settings that transformers needs, next to the tokenizer's file, to tokenize as π₀ does."""
    names = {f"{name}_token": text for name, text in special_tokens.items()}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
    write_json(root / "tokenizer_config.json", settings)
