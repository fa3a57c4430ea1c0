"""LeRobot's π₀ and π₀.₅ policies: what is around the weights, read and written.

config.json has the sizes and the features, policy_preprocessor.json and policy_postprocessor.json the steps around the
model, each with its settings; the statistics lie in safetensors files that the steps name.

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
    "python -m lerobot.processor.migrate_policy_normalization --pretrained-path FOLDER, of LeRobot 0.4 or later, which "
    "writes its statistics into processors"
)

_NEUTRAL = ("to_batch_processor", "device_processor")
# The steps, of which each works on what those before it in a line have made.
_NORMALIZING = ("rename_observations_processor", "relative_actions_processor", "normalizer_processor")
_TOKENS, _STATE_TEXT = "tokenizer_processor", "pi05_prepare_state_tokenizer_processor_step"
_BEFORE = {
    "pi0": (_NORMALIZING, ("rename_observations_processor", "pi0_new_line_processor", _TOKENS)),
    "pi05": ((*_NORMALIZING, _STATE_TEXT, _TOKENS),),
}
_AFTER = (("unnormalizer_processor", "absolute_actions_processor"),)
_SINCE_051 = {"use_relative_actions", "use_visual_memory", "pretrained_revision", "rtc_training_max_delay"}
"""Fields of config.json that LeRobot writes since 0.5.1, or later; so is the step for relative actions."""
_OPTIONAL = {"rename_observations_processor", "relative_actions_processor", "absolute_actions_processor"}


@dataclasses.dataclass(frozen=True)
class _Processor:
    steps: list[Step]
    name: str = ""


def require_readable(root: pathlib.Path, document: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse by their names models that are not read, by config.json and the names of the arrays in their folder."""
    kind = document.get("type") or document.get("model_type")
    if str(kind) in ("pi0_fast", "pi0fast"):
        raise CheckpointError(f"{root} is a π₀-FAST policy of LeRobot, which is not read yet; π₀ and π₀.₅ are.")
    if "model_type" in document and "type" not in document:
        more = ": its published .npz file is read, with config=" if kind == "paligemma" else ""
        raise CheckpointError(f"{root} is a {kind} model of transformers; only policies are read{more}.")
    if buffers := [name for name in names if name.startswith(("normalize_", "unnormalize_"))]:
        raise CheckpointError(
            f"{root} is a policy of LeRobot before version 0.4, with its statistics among the weights ({buffers[0]}). "
            f"Migrate it: {MIGRATION}."
        )


def read_spec(root: pathlib.Path, document: Mapping[str, Any]) -> PolicySpec:
    """Everything around the model of the LeRobot policy in a folder, whose config.json is `document`."""
    if (kind := document.get("type")) not in _BEFORE:
        raise CheckpointError(f"{root / 'config.json'}: type is {kind!r}; {listed(_BEFORE)} policies are read.")
    before, after = _steps(root / PREPROCESSOR, _BEFORE[kind]), _steps(root / POSTPROCESSOR, _AFTER)
    try:
        relative = _relative_actions(root, before, after)
        renamed = before.get("rename_observations_processor", Step("")).config.get("rename_map", {})
        stats, rules = normalizations(root, before["normalizer_processor"], after["unnormalizer_processor"])
        embodiment = _embodiment(document, relative, renamed, stats)
        tokens = before[_TOKENS]
        length = tokens.config["max_length"]
        tokenizer = str(tokens.artifacts.get("tokenizer_name") or tokens.config.get("tokenizer_name", ""))
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{root}: config.json or a processor is not as LeRobot writes them ({error!r}); get the files again."
        ) from error
    if length != document.get("tokenizer_max_length"):
        raise CheckpointError(
            f"{root}: the tokenizer's step has max_length {length}, config.json tokenizer_max_length "
            f"{document.get('tokenizer_max_length')}; correct one of them."
        )
    if not tokenizer.isprintable() or len(tokenizer.encode()) > 255:
        raise CheckpointError(f"{root / PREPROCESSOR}: tokenizer_name {tokenizer!a:.80} can't be the name of a folder.")
    inside = root.resolve() in (root / tokenizer).resolve().parents  # else the name of PaliGemma's on a hub
    max_prefix = document.get("rtc_training_max_delay")
    program, unstated = _preprocessing(root, document, before, has_statistics=bool(stats))
    transform, state_dim = PREPROCESSING[program]
    width = document.get("max_state_dim", state_dim)
    if state_dim and not (is_whole(width) and 0 < width <= 1000):
        raise CheckpointError(f"{root / 'config.json'}: max_state_dim is {width!r:.80}; expected 1 to 1000.")
    return PolicySpec(
        source=str(root),
        embodiment=embodiment,
        norm_stats=stats if len(stats) == len(rules) else None,
        normalization=rules,
        tokenizer=tokenizer_file(root / tokenizer) if inside else None,
        prompt_format="lerobot",
        prompt_state_dim=width if state_dim else None,  # the step is saved without it
        image_transform=transform,
        unstated=unstated,
        num_steps=document.get("num_inference_steps") or PolicySpec.num_steps,
        metadata={MAX_ACTION_PREFIX: max_prefix} if max_prefix else {},
    )


def _preprocessing(
    root: pathlib.Path, document: Mapping[str, Any], before: Mapping[str, Step], *, has_statistics: bool
) -> tuple[Preprocessing, str]:
    """The version by which a policy was trained, and a warning if the folder does not say it.

    LeRobot 0.5.0 made the bars black and left the zeros behind the state out of the prompt. It writes the fields of
    0.4.4, and `cudnn_deterministic` in the settings of its trainings.
    """
    if (file := root / "train_config.json").is_file():
        later = "cudnn_deterministic" in read_json_object(file, error=CheckpointError)
        return ("lerobot" if later else "lerobot_0.4"), ""
    if _SINCE_051 & {*document} or "relative_actions_processor" in before:
        return "lerobot", ""
    # A base has no statistics: it is openpi's, and a training begins from it.
    assumed: Preprocessing = "lerobot_0.4" if has_statistics else "lerobot"
    return assumed, (
        f"{root} does not say whether LeRobot 0.4 or 0.5.0 trained it: 0.4 put bars of -3 beside images that are not "
        "square, and zeros behind the state in π₀.₅'s prompt. Pass preprocessing= with lerobot_0.4, lerobot (0.5 and "
        f"later) or openpi, whichever trained it; here it is read as {assumed}."
    )


def _steps(file: pathlib.Path, lines: Sequence[tuple[str, ...]]) -> dict[str, Step]:
    """The steps in a file by their names: each known, none missing or doubled, in the order of each of the lines."""
    if not file.is_file():
        raise MissingFileError(
            f"{file} does not exist; a LeRobot policy since version 0.4 has it. Get the file, or migrate an older "
            f"policy: {MIGRATION}."
        )
    document = read_json_object(file, error=CheckpointError)
    steps = parse(_Processor, document, f"{file} is not as LeRobot writes it: it", error=CheckpointError).steps
    names, ordered = [step.registry_name for step in steps], dict.fromkeys(name for line in lines for name in line)
    if unknown := sorted({*names} - {*ordered, *_NEUTRAL}):
        raise CheckpointError(
            f"{file} has steps that are not known here: {', '.join(unknown)}; known are "
            f"{', '.join([*ordered, *_NEUTRAL])}."
        )
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"{file} has the steps {', '.join(doubled)} twice; expected each once.")
    if missing := [name for name in ordered if name not in {*names, *_OPTIONAL}]:
        raise CheckpointError(f"{file} lacks the steps {', '.join(missing)}, which such a policy of LeRobot has.")
    for line in lines:
        found, expected = ([name for name in order if name in other] for order, other in ((names, line), (line, names)))
        if found != expected:
            raise CheckpointError(
                f"{file} has its steps in the order {', '.join(found)}; expected {', '.join(expected)}."
            )
    for step in steps:
        require_fields(f"lerobot: {step.registry_name}", step.config, f"{file}: {step.registry_name}")
    return {step.registry_name: step for step in steps}


def _relative_actions(root: pathlib.Path, before: Mapping[str, Step], after: Mapping[str, Step]) -> Mapping[str, Any]:
    """The settings of the step that makes actions relative, with which the one behind the model has to agree."""
    step, back = (
        steps.get(f"{name}_actions_processor", Step("")).config
        for steps, name in ((before, "relative"), (after, "absolute"))
    )
    on, on_again = bool(step.get("enabled")), bool(back.get("enabled"))
    if on != on_again:
        raise CheckpointError(
            f"{root}: relative actions are {'on' if on else 'off'} in {PREPROCESSOR}, but not in {POSTPROCESSOR}: the "
            "robot would be sent actions of the other kind. Set both to what the policy was trained with."
        )
    return step


def _embodiment(
    document: Mapping[str, Any], relative: Mapping[str, Any], renamed: Mapping[str, str], stats: Mapping[str, NormStats]
) -> Embodiment:
    robots_name = {theirs: robots for robots, theirs in renamed.items()}
    inputs, output = document["input_features"], document["output_features"][ACTION]
    cameras = []
    visual = [key for key, feature in inputs.items() if feature["type"] == "VISUAL"]
    empty = [f"{EMPTY_CAMERA}{i}" for i in range(document.get("empty_cameras") or 0)]  # LeRobot adds them when it loads
    for key in dict.fromkeys([*visual, *empty]):
        name = key.removeprefix(IMAGES)
        if key.startswith(EMPTY_CAMERA):
            cameras.append(Camera(name, None, "masked"))
        else:  # LeRobot masks whichever is missing, as long as one is there
            cameras.append(Camera(name, robots_name.get(key, key), "optional", layout="chw", dtype="any"))
    # Features may have been left as wide as the base's; statistics are of the robot.
    num_states = stats["state"].dim if "state" in stats else inputs[STATE]["shape"][0]
    num_actions = min(output["shape"][0], stats["actions"].dim if "actions" in stats else output["shape"][0])
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


# ---- writing ----


def write_spec(root: pathlib.Path, config: Pi0Config, spec: PolicySpec, dtype: str) -> list[str]:
    """Write config.json and both processors with their statistics, as LeRobot 0.6 does; notes on what it does
    differently with this policy. The tokenizer is expected in the folder `TOKENIZER` beside them."""
    robot, rules = spec.embodiment, spec.normalization
    assert robot is not None
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
    notes = ["rates, names, units, commands and limits of the robot are not written: LeRobot has no place for them"]
    state = robot.state
    if MAX_ACTION_PREFIX in spec.metadata:
        notes.append("rtc_training_max_delay is written, which LeRobot knows after version 0.6.1")
    if robots_own := [key for key in renamed if not key.startswith("observation.")]:
        notes.append(
            f"send LeRobot its own names ({IMAGES}…, {STATE}): it drops {', '.join(robots_own)} before it renames"
        )
    if len(state) > 1:
        keys = ", ".join(part.key for part in state)
        notes.append(f"the state is one vector there: send {keys} one behind the other as {STATE}")
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
    config: Pi0Config, spec: PolicySpec, scaling: Mapping[str, Any], relative: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    features, horizon, robot = scaling["features"], config.require("action_horizon"), spec.embodiment
    assert robot is not None
    max_prefix = spec.metadata.get(MAX_ACTION_PREFIX, 0)
    return {
        # Of LeRobot later than 0.6.1; others refuse the field.
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
    """Write the settings that transformers needs, next to the tokenizer's file, to tokenize as π₀ does."""
    names = {f"{name}_token": text for name, text in special_tokens.items()}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
    write_json(root / "tokenizer_config.json", settings)
