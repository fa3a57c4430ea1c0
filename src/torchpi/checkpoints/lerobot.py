"""LeRobot's π₀ and π₀.₅ policies: everything except the weights, read and written.

config.json has the sizes and features; policy_preprocessor.json and policy_postprocessor.json have the steps before and
after the model; the steps name safetensors files with the statistics.

Source: the processors of LeRobot 0.4 to 0.6.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from torchpi.checkpoints.fields import require_fields
from torchpi.checkpoints.folder import tokenizer_file
from torchpi.checkpoints.lerobot_normalization import ACTION, POSTPROCESSOR, PREPROCESSOR, STATE, Step, normalizations
from torchpi.checkpoints.spec import MAX_ACTION_PREFIX, PREPROCESSING, PolicySpec, Preprocessing
from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError, MissingFileError, is_whole, listed
from torchpi.robots import ActionDim, Camera, Embodiment, StateKey
from torchpi.schema import parse, read_json_object, write_json
from torchpi.transforms.normalize import NormStats

IMAGES = "observation.images."
EMPTY_CAMERA = f"{IMAGES}empty_camera_"
TOKENIZER = "tokenizer"
EPS = 1e-8

MIGRATION = (
    "python -m lerobot.processor.migrate_policy_normalization --pretrained-path FOLDER, in LeRobot 0.4 or later, which "
    "moves the statistics into processors"
)

_NEUTRAL = ("to_batch_processor", "device_processor")
# Required order of steps, by the policy's type: in each sequence a step uses the output of the steps before it.
_NORMALIZING = ("rename_observations_processor", "relative_actions_processor", "normalizer_processor")
_TOKENS, _STATE_TEXT = "tokenizer_processor", "pi05_prepare_state_tokenizer_processor_step"
_BEFORE = {
    "pi0": (_NORMALIZING, ("rename_observations_processor", "pi0_new_line_processor", _TOKENS)),
    "pi05": ((*_NORMALIZING, _STATE_TEXT, _TOKENS),),
}
_AFTER = (("unnormalizer_processor", "absolute_actions_processor"),)
_SINCE_051 = {"use_relative_actions", "use_visual_memory", "pretrained_revision", "rtc_training_max_delay"}
"""Fields of config.json that only LeRobot 0.5.1 and later write; the step for relative actions is as recent."""
_OPTIONAL = {"rename_observations_processor", "relative_actions_processor", "absolute_actions_processor"}


@dataclasses.dataclass(frozen=True)
class _Processor:
    steps: list[Step]
    name: str = ""


def require_readable(root: pathlib.Path, document: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise an error that names the model if config.json or the names of the arrays show an unsupported one."""
    kind = document.get("type") or document.get("model_type")
    if str(kind) in ("pi0_fast", "pi0fast"):
        raise CheckpointError(f"{root} is a π₀-FAST policy of LeRobot, which is not supported yet; π₀ and π₀.₅ are.")
    if "model_type" in document and "type" not in document:
        hint = ". For PaliGemma, load the published .npz file, with config=" if kind == "paligemma" else ""
        raise CheckpointError(f"{root} is a {kind} model of transformers; only policies are supported{hint}.")
    if buffers := [name for name in names if name.startswith(("normalize_", "unnormalize_"))]:
        raise CheckpointError(
            f"{root} is a policy of LeRobot before version 0.4, with statistics among the weights ({buffers[0]}). "
            f"Migrate it: {MIGRATION}."
        )


def read_spec(root: pathlib.Path, document: Mapping[str, Any]) -> PolicySpec:
    """Read everything except the weights of the policy in a folder; `document` is its config.json."""
    if (kind := document.get("type")) not in _BEFORE:
        raise CheckpointError(f"{root / 'config.json'}: type is {kind!r}; expected {listed(_BEFORE, 'or')}.")
    before, after = _read_steps(root / PREPROCESSOR, _BEFORE[kind]), _read_steps(root / POSTPROCESSOR, _AFTER)
    try:
        relative = _read_relative(root, before, after)
        renamed = before.get("rename_observations_processor", Step("")).config.get("rename_map", {})
        stats, rules = normalizations(root, before["normalizer_processor"], after["unnormalizer_processor"])
        embodiment = _embodiment(document, relative, renamed, stats)
        tokenizer_step = before[_TOKENS]
        max_length = tokenizer_step.config["max_length"]
        tokenizer = str(
            tokenizer_step.artifacts.get("tokenizer_name") or tokenizer_step.config.get("tokenizer_name", "")
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{root}: config.json or a processor does not have LeRobot's format ({error!r}); get the files again."
        ) from error
    if max_length != document.get("tokenizer_max_length"):
        raise CheckpointError(
            f"{root}: the tokenizer's step has max_length {max_length}, config.json has tokenizer_max_length "
            f"{document.get('tokenizer_max_length')}; correct one of them."
        )
    if not tokenizer.isprintable() or len(tokenizer.encode()) > 255:
        raise CheckpointError(f"{root / PREPROCESSOR}: tokenizer_name {tokenizer!a:.80} can't be the name of a folder.")
    is_in_folder = root.resolve() in (root / tokenizer).resolve().parents  # otherwise PaliGemma's, on the Hub
    max_prefix = document.get("rtc_training_max_delay")
    program, unstated = _preprocessing(root, document, before, has_statistics=bool(stats))
    transform, prompt_state_dim = PREPROCESSING[program]
    if prompt_state_dim:  # config.json has the number, the processor's step does not
        prompt_state_dim = document.get("max_state_dim", prompt_state_dim)
        if not is_whole(prompt_state_dim) or not 0 < prompt_state_dim <= 1000:
            raise CheckpointError(
                f"{root / 'config.json'}: max_state_dim is {prompt_state_dim!r:.80}; expected 1 to 1000."
            )
    return PolicySpec(
        source=str(root),
        embodiment=embodiment,
        norm_stats=stats if len(stats) == len(rules) else None,
        normalization=rules,
        tokenizer=tokenizer_file(root / tokenizer) if is_in_folder else None,
        prompt_format="lerobot",
        prompt_state_dim=prompt_state_dim,
        image_transform=transform,
        unstated=unstated,
        num_steps=document.get("num_inference_steps") or PolicySpec.num_steps,
        metadata={MAX_ACTION_PREFIX: max_prefix} if max_prefix else {},
    )


def _preprocessing(
    root: pathlib.Path, document: Mapping[str, Any], before: Mapping[str, Step], *, has_statistics: bool
) -> tuple[Preprocessing, str]:
    """The version of LeRobot that trained a policy, and a warning if the folder does not determine it.

    LeRobot 0.5.0 changed the padding of images to black, and no longer pads the state in the prompt with zeros. Its
    config.json has the same fields as 0.4.4's, but its training configs have `cudnn_deterministic`.
    """
    if (file := root / "train_config.json").is_file():
        is_new = "cudnn_deterministic" in read_json_object(file, error=CheckpointError)
        return ("lerobot" if is_new else "lerobot_0.4"), ""
    if _SINCE_051 & {*document} or "relative_actions_processor" in before:
        return "lerobot", ""
    # A policy without statistics is a base: openpi's weights, to be fine-tuned.
    assumed: Preprocessing = "lerobot_0.4" if has_statistics else "lerobot"
    return assumed, (
        f"{root} does not say whether LeRobot 0.4 or 0.5.0 trained it: 0.4 padded images that are not square with -3, "
        "and the state in π₀.₅'s prompt with zeros. Pass preprocessing= with lerobot_0.4, lerobot (0.5 and later) or "
        f"openpi, whichever trained it; {assumed} is assumed."
    )


def _read_steps(file: pathlib.Path, sequences: Sequence[tuple[str, ...]]) -> dict[str, Step]:
    """Read the steps of a processor by name; check that all are known and complete, and in the order of `sequences`."""
    if not file.is_file():
        raise MissingFileError(
            f"{file} does not exist; a LeRobot policy since version 0.4 has it. Get the file, or migrate an older "
            f"policy: {MIGRATION}."
        )
    document = read_json_object(file, error=CheckpointError)
    steps = parse(_Processor, document, f"{file} does not have LeRobot's format: it", error=CheckpointError).steps
    names = [step.registry_name for step in steps]
    expected = dict.fromkeys(name for sequence in sequences for name in sequence)
    if unknown := sorted({*names} - {*expected, *_NEUTRAL}):
        raise CheckpointError(
            f"{file} has unknown steps: {', '.join(unknown)}; known are {', '.join([*expected, *_NEUTRAL])}."
        )
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"{file} has the steps {', '.join(duplicates)} twice; expected each once.")
    if missing := [name for name in expected if name not in {*names, *_OPTIONAL}]:
        raise CheckpointError(f"{file} lacks the steps {', '.join(missing)}, which such a policy of LeRobot has.")
    for sequence in sequences:
        order = [name for name in names if name in sequence]
        expected_order = [name for name in sequence if name in names]
        if order != expected_order:
            raise CheckpointError(
                f"{file} has its steps in the order {', '.join(order)}; expected {', '.join(expected_order)}."
            )
    for step in steps:
        require_fields(f"lerobot: {step.registry_name}", step.config, f"{file}: {step.registry_name}")
    return {step.registry_name: step for step in steps}


def _read_relative(root: pathlib.Path, before: Mapping[str, Step], after: Mapping[str, Step]) -> Mapping[str, Any]:
    """Settings of the step for relative actions, after comparing them with the step that reverts it."""
    relative = before.get("relative_actions_processor", Step("")).config
    absolute = after.get("absolute_actions_processor", Step("")).config
    if bool(relative.get("enabled")) != bool(absolute.get("enabled")):
        raise CheckpointError(
            f"{root}: relative actions are {'on' if relative.get('enabled') else 'off'} in {PREPROCESSOR}, but not in "
            f"{POSTPROCESSOR}: the robot would get actions of the wrong kind. Set both as the policy was trained."
        )
    return relative


def _embodiment(
    document: Mapping[str, Any], relative: Mapping[str, Any], renamed: Mapping[str, str], stats: Mapping[str, NormStats]
) -> Embodiment:
    robot_keys = {feature: robot_key for robot_key, feature in renamed.items()}
    inputs, output = document["input_features"], document["output_features"][ACTION]
    cameras = []
    visual = [key for key, feature in inputs.items() if feature["type"] == "VISUAL"]
    empty = [f"{EMPTY_CAMERA}{i}" for i in range(document.get("empty_cameras") or 0)]  # LeRobot adds them when it loads
    for key in dict.fromkeys([*visual, *empty]):
        name = key.removeprefix(IMAGES)
        if key.startswith(EMPTY_CAMERA):
            cameras.append(Camera(name, None, "masked"))
        else:  # LeRobot masks missing cameras, as long as there is one
            cameras.append(Camera(name, robot_keys.get(key, key), "optional", layout="chw", dtype="any"))
    # The statistics have the robot's dimensions; the features may still have the base's.
    num_states = stats["state"].dim if "state" in stats else inputs[STATE]["shape"][0]
    num_actions = min(output["shape"][0], stats["actions"].dim if "actions" in stats else output["shape"][0])
    stated_names = relative.get("action_names") or document.get("action_feature_names") or []
    # LeRobot excludes actions from being relative by parts of their names; without names it excludes none.
    tokens = relative.get("exclude_joints") if relative.get("action_names") else None
    excluded = [str(token).lower() for token in tokens or [] if token]
    actions = []
    for i in range(num_actions):
        name = str(stated_names[i]) if i < len(stated_names) else f"action_{i}"
        is_delta = bool(relative.get("enabled")) and not any(token in name.lower() for token in excluded)
        actions.append(ActionDim(name, kind="delta" if is_delta else "absolute"))
    return Embodiment(
        "lerobot",
        cameras=tuple(cameras),
        state=(StateKey(robot_keys.get(STATE, STATE), tuple(f"state_{i}" for i in range(num_states))),),
        actions=tuple(actions),
        execute_steps=document.get("n_action_steps"),
    )


# ---- writing ----


def write_spec(root: pathlib.Path, config: Pi0Config, spec: PolicySpec, dtype: str) -> list[str]:
    """Write config.json and both processors with their statistics, as LeRobot 0.6 does.

    The tokenizer belongs in the folder `TOKENIZER` next to them. Returns notes on what LeRobot does differently.
    """
    robot, rules = spec.embodiment, spec.normalization
    assert robot is not None
    assert rules is not None
    if robot.hook is not None:
        raise CheckpointError(
            f"embodiment {robot.name!r} converts units with the code {robot.hook!r}, for which LeRobot has no step; "
            "convert with an embodiment in the model's own units."
        )
    if not robot.state:
        raise CheckpointError(f"{robot.name} has no state, but LeRobot's policies need one; it can't be converted.")
    if depths := [str(camera.key) for camera in robot.read_cameras if camera.depth is not None]:
        raise CheckpointError(
            f"embodiment {robot.name!r} maps the depth of {', '.join(depths)} to colours, for which LeRobot has no "
            "step; convert with an embodiment that receives the colours."
        )
    if config.discrete_state_input not in (None, config.pi05):
        raise CheckpointError(
            f"discrete_state_input is {config.discrete_state_input}: LeRobot always has the state in π₀.₅'s prompt and "
            "never in π₀'s, so the policy would get a different prompt there."
        )
    resized = spec.require_preprocessing("lerobot", config)
    eps_rules = {key: dataclasses.replace(rule, eps_rule="lerobot") for key, rule in rules.items()}
    spec, notes = spec.normalized_by(eps_rules)
    stats = spec.norm_stats or {}
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
    write_json(root / "config.json", _document(config, spec, scaling, relative, dtype))
    return [*notes, *_notes(config, spec, robot, renamed), *resized]


def _notes(config: Pi0Config, spec: PolicySpec, robot: Embodiment, renamed: Mapping[str, str]) -> list[str]:
    notes = ["rates, names, units, commands and limits of the robot are not written: LeRobot has no fields for them"]
    if MAX_ACTION_PREFIX in spec.metadata:
        notes.append("rtc_training_max_delay is written, which only LeRobot after version 0.6.1 can read")
    if robot_keys := [key for key in renamed if not key.startswith("observation.")]:
        notes.append(
            f"send LeRobot its own names ({IMAGES}…, {STATE}): it drops {', '.join(robot_keys)} before it renames"
        )
    if len(robot.state) > 1:
        keys = ", ".join(part.key for part in robot.state)
        notes.append(f"LeRobot's state is one vector: send {keys} concatenated as {STATE}")
    if not config.pi05 and spec.prompt_format != "lerobot":
        notes.append("LeRobot does not clean the prompt, and tokenizes its newline together with the text")
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
    """LeRobot's features in the model's order, and the robot key → feature map."""
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
    # LeRobot excludes every action whose name contains one of these.
    tokens = [name.lower() for name in excluded]
    deltas = [action.name for action in robot.actions if action.kind == "delta"]
    ambiguous = [name for name in deltas if any(token in name.lower() for token in tokens)]
    if enabled and ambiguous:
        raise CheckpointError(
            f"LeRobot excludes actions from being relative by parts of their names, and {', '.join(ambiguous)} "
            f"contains one of {', '.join(excluded)}; rename the actions of the embodiment."
        )
    return {"enabled": enabled, "exclude_joints": excluded if enabled else ["gripper"], "action_names": names}


def _document(
    config: Pi0Config, spec: PolicySpec, scaling: Mapping[str, Any], relative: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    features, horizon, robot = scaling["features"], config.require("action_horizon"), spec.embodiment
    assert robot is not None
    max_prefix = spec.metadata.get(MAX_ACTION_PREFIX, 0)
    return {
        # Only if needed, since LeRobot up to 0.6.1 refuses the field.
        **({"rtc_training_max_delay": max_prefix} if max_prefix else {}),
        "type": "pi05" if config.pi05 else "pi0",
        "n_obs_steps": 1,
        "input_features": {key: value for key, value in features.items() if key != ACTION},
        "output_features": {ACTION: features[ACTION]},
        "device": "cpu",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": horizon,
        "n_action_steps": min(robot.execute_steps or horizon, horizon),
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": spec.num_steps,
        "use_relative_actions": relative["enabled"],
        "relative_exclude_joints": relative["exclude_joints"],
        "action_feature_names": relative["action_names"],
        "image_resolution": [config.image_size, config.image_size],
        "empty_cameras": sum(camera.key is None for camera in robot.read_cameras),
        "tokenizer_max_length": config.require("max_token_len"),
        "normalization_mapping": scaling["norm_map"],
    }


def write_tokenizer_config(root: pathlib.Path, special_tokens: Mapping[str, str]) -> None:
    """Write the settings with which transformers tokenizes as π₀ does, next to the tokenizer's file."""
    names = {f"{name}_token": text for name, text in special_tokens.items()}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
    write_json(root / "tokenizer_config.json", settings)
