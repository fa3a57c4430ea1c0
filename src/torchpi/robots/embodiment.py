"""Description of a robot as data: its cameras, state and actions, in the order that a policy was trained with."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi import schema
from torchpi.errors import EmbodimentError, UnknownKeyError, counted, first_of, is_whole
from torchpi.robots.keys import flatten, nest
from torchpi.robots.parts import BEYOND_LIMITS, HOOKS, LIMITS, ActionDim, Camera, StateKey, numbers
from torchpi.transforms.actions import absolute_actions, delta_actions
from torchpi.transforms.normalize import require_finite
from torchpi.transforms.prompt import as_text


@dataclasses.dataclass(frozen=True)
class _Generic:
    """Schema of the arguments of `Embodiment.generic`."""

    cameras: dict[str, str]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    delta: tuple[str, ...]
    command: str | dict[str, str | None] | None
    limits: dict[str, dict[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot: its observations, which parts of them the model reads, and its actions.

    Describe your own robot without code:

        Embodiment.generic(
            "my_arm",
            cameras={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
            state=["shoulder", "elbow", "wrist", "gripper"],
            actions=["shoulder", "elbow", "wrist", "gripper"],
            delta=["shoulder", "elbow", "wrist"],
            command="position",
            control_hz=30,
            execute_steps=15,
        )

    Its observations are {"front": uint8 [h, w, 3], "wrist": uint8 [h, w, 3], "state": [4], "prompt": str}. `command`
    says how the robot interprets an action; the control loop needs it to hold the robot still.

    Raises:
        ValueError: fields contradict each other.
    """

    name: str
    """Name, shown in messages."""
    cameras: tuple[Camera, ...]
    """Cameras, in the order in which the model reads them."""
    state: tuple[StateKey, ...]
    """Parts of the state vector, in order; empty if the policy reads no state."""
    actions: tuple[ActionDim, ...]
    """Dimensions of an action, in order."""
    hook: str | None = None
    """Name of the unit conversion in `HOOKS`; None: the robot's units are the model's."""
    control_hz: float | int | None = None
    """Control rate in actions per second."""
    execute_steps: int | None = None
    """Recommended number of actions to execute before requesting the next chunk."""
    default_prompt: str | None = None
    """Instruction for requests without a prompt."""
    beyond_limits: str = "clip"
    """Handling of actions beyond the limits of their dimension: "clip" them and report their number; "refuse" the
    chunk; "send" them as openpi does, for robots and control loops that enforce limits themselves."""
    asset_id: str | None = None
    """Name of this robot's statistics in a checkpoint: assets/<asset_id>."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Free JSON metadata for clients."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_warned", False)
        for field in ("cameras", "state", "actions"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if problem := self._first_problem():
            raise EmbodimentError(f"Embodiment '{self.name}': {problem}")

    def _first_problem(self) -> str | None:
        if not (self.read_cameras and self.actions):
            return "expected at least one camera that is read and one action."
        keys = [camera.key for camera in self.cameras if camera.key] + [part.key for part in self.state]
        for label, values in (("camera name", list(self.camera_names)), ("key", keys)):
            if duplicates := sorted({value for value in values if values.count(value) > 1}):
                return f"{label} {', '.join(duplicates)} occurs more than once."
        if any(part.min_dim not in (None, len(part.names)) for part in self.state[:-1]):
            return "only the last state may be shorter, or the dimensions would move."
        if stateless := [action.name for action in self.actions[self.state_dims[0] :] if action.kind == "delta"]:
            size = f"may have only {counted(self.state_dims[0], 'dimension')}" if self.state else "has none"
            return (
                f"the actions {', '.join(stateless)} are deltas, but the state {size}; a delta refers to the state of "
                "the same index."
            )
        if self.hook is not None and self.hook not in HOOKS:
            return (
                f"no hook {self.hook!r}; known are {sorted(HOOKS)}. "
                "Import the module that registers it in torchpi.robots.HOOKS first."
            )
        if self.beyond_limits not in BEYOND_LIMITS:
            return f"beyond_limits is {self.beyond_limits!r:.80}; expected one of {', '.join(BEYOND_LIMITS)}."
        if self.control_hz is not None and not self.control_hz > 0:
            return f"control_hz is {self.control_hz}; expected a positive number."
        if (steps := self.execute_steps) is not None and not (is_whole(steps) and steps > 0):
            return f"execute_steps is {steps}; expected a positive whole number."
        return None

    def check_names(self, where: str | None = None) -> None:
        """Raise an EmbodimentError for duplicate names, and for a delta with the name of a state at another index.

        The constructor does not call this: an already trained policy only gets a warning.
        """
        where, states = where or f"Embodiment '{self.name}'", self.state_names
        lists = {"actions": self.action_names, **{f"names of state {part.key!r}": part.names for part in self.state}}
        for label, names in lists.items():
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                raise EmbodimentError(
                    f"{where}: the {label} have {', '.join(duplicates)} more than once; rename all but one."
                )
        for i, action in enumerate(self.actions):
            if action.kind == "delta" and action.name in states and states[i] != action.name:
                raise EmbodimentError(
                    f"{where}: action {action.name!r} is a delta at index {i}, but the state has {action.name!r} at "
                    f"index {states.index(action.name)} and {states[i]!r} at {i}; the delta would be between different "
                    "joints. List state and actions in the same order, or make the action absolute."
                )

    @classmethod
    def generic(
        cls,
        name: str,
        *,
        cameras: Mapping[str, str],
        state: Sequence[str],
        actions: Sequence[str],
        delta: Sequence[str] = (),
        command: str | Mapping[str, str] | None = None,
        limits: Mapping[str, Mapping[str, Any]] | None = None,
        state_key: str = "state",
        **fields: Any,
    ) -> "Embodiment":
        """Describe a robot without unit conversions whose cameras are all required and uint8 [h, w, 3].

        Args:
            cameras: observation key by the model's camera name, in the model's order.
            state, actions: names of the dimensions; [] for no state.
            delta: actions that the model predicts relative to the state.
            command: how the robot interprets actions, see `ActionDim`: one for all, or by action name.
            limits: by action name, any of "low", "high" and "max_step", see `ActionDim`.
            state_key: key of the state vector in the observation.
            fields: further fields of the embodiment (control_hz, default_prompt, …).

        Raises:
            ValueError: an argument of the wrong type; delta, command or limits of an unknown action; duplicate names; a
                delta whose name the state has at another index; errors of the constructor.
        """
        label = f"Embodiment '{name}'"
        arguments = {"cameras": cameras, "state": state, "actions": actions, "delta": delta, "command": command}
        args = schema.parse(_Generic, arguments | {"limits": limits}, label, error=EmbodimentError)
        commands = dict.fromkeys(args.actions, args.command) if isinstance(args.command, str) else args.command or {}
        limits = args.limits or {}
        for field, action_names in (("delta", args.delta), ("command", commands), ("limits", limits)):
            if unknown := [action for action in action_names if action not in args.actions]:
                raise EmbodimentError(f"{label}: {field} names {unknown}; expected some of {list(args.actions)}.")
        if unknown := sorted({field for limit in limits.values() for field in limit} - set(LIMITS)):
            raise EmbodimentError(f"{label}: limits have {unknown}; expected {', '.join(LIMITS)}.")
        dimensions = []
        for action in args.actions:
            kind = "delta" if action in args.delta else "absolute"
            dimensions.append(ActionDim(action, "", kind, commands.get(action), **limits.get(action, {})))
        robot = cls(
            name,
            cameras=tuple(Camera(model_name, key) for model_name, key in args.cameras.items()),
            state=(StateKey(state_key, args.state),) if args.state else (),
            actions=tuple(dimensions),
            **fields,
        )
        robot.check_names()
        return robot

    @property
    def read_cameras(self) -> tuple[Camera, ...]:
        """Cameras that the model reads, in its order."""
        return tuple(camera for camera in self.cameras if camera.presence != "ignored")

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The model's names of its cameras, in its order."""
        return tuple(camera.name for camera in self.read_cameras if camera.name is not None)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.state for name in part.names)

    @property
    def state_units(self) -> tuple[str, ...]:
        """Units of the state dimensions; "" if not stated."""
        return tuple(unit for part in self.state for unit in part.units or ("",) * len(part.names))

    @property
    def action_names(self) -> tuple[str, ...]:
        return tuple(action.name for action in self.actions)

    @property
    def action_units(self) -> tuple[str, ...]:
        """Units of the action dimensions; "" if not stated."""
        return tuple(action.unit for action in self.actions)

    @property
    def state_dims(self) -> range:
        """Allowed lengths of the state."""
        return range(sum(part.dims[0] for part in self.state), len(self.state_names) + 1)

    @property
    def action_size(self) -> int:
        """a: number of action dimensions."""
        return len(self.actions)

    @property
    def action_mask(self) -> tuple[bool, ...]:
        """True for delta actions, per dimension."""
        return tuple(action.kind == "delta" for action in self.actions)

    @property
    def observation_format(self) -> dict[str, Any]:
        """Description of an observation for clients: "cameras" with key, layout, dtype, presence and depth unit, and
        "state" with the key, names and units of its parts. The key of the instruction is "prompt"."""
        cameras = [
            {"key": camera.key, "layout": camera.layout, "dtype": camera.dtype, "presence": camera.presence}
            | ({"depth_unit": camera.depth.unit} if camera.depth else {})
            for camera in self.read_cameras
            if camera.key is not None
        ]
        state = [{"key": part.key, "names": list(part.names), "units": list(part.units or ())} for part in self.state]
        return {"cameras": cameras, "state": state}

    @property
    def action_limits(self) -> dict[str, list[float | int | None]] | None:
        """ "low", "high" and "max_step" per action dimension, None where not stated; None if there are no limits."""
        limits = {field: [getattr(action, field) for action in self.actions] for field in LIMITS}
        return limits if any(value is not None for values in limits.values() for value in values) else None

    def to_model(
        self, observation: Any, *, default_prompt: str | None = None, state_dim: int | None = None
    ) -> dict[str, Any]:
        """Convert an observation of the robot to the model's camera names and units. The argument is not changed.

        Unknown keys that are not cameras cause one warning per object.

        Args:
            observation: the robot's own keys, nested or joined by '.'; in training also "actions" [H, a] in the robot's
                units.
            default_prompt: for an observation without "prompt"; by default the embodiment's.
            state_dim: accept only this length of the state.

        Returns:
            "image" {camera: uint8 [h, w, 3]} and "image_mask" {camera: bool} in the embodiment's order, black and False
            for an absent camera; "state" [s] in the model's units; "prompt" str; if the observation has actions,
            "actions" [H, a] in the model's units, with deltas relative to the state.

        Raises:
            KeyError: a required camera or part of the state is missing, or there is an unknown camera.
            ValueError: a value of the wrong type or shape, NaN or infinity, or no prompt.
        """
        if not isinstance(observation, Mapping):
            raise EmbodimentError(
                f"An observation is a dict with the robot's keys; found a value of type {type(observation).__name__}."
            )
        values = flatten(observation)
        self._check_keys(values)
        image, image_mask = self._images(values)
        state = self._state(values, state_dim)
        hook = HOOKS[self.hook] if self.hook else None
        sample: dict[str, Any] = {
            "image": image,
            "image_mask": image_mask,
            "state": hook.state_to_model(state) if hook and self.state else state,
            "prompt": self._prompt(values.get("prompt"), default_prompt),
        }
        if values.get("actions") is not None:
            actions = numbers(values["actions"], "actions")
            self._check_actions(actions)
            require_finite(actions, "actions", self.action_names)
            if hook:
                actions = hook.actions_to_model(actions)
            if any(self.action_mask):
                actions = delta_actions(actions, sample["state"], self.action_mask)
            sample["actions"] = actions
        return sample

    def from_model(self, actions: np.ndarray, state: np.ndarray) -> Float[np.ndarray, "H a"]:
        """Convert the model's actions to the robot's units.

        Args:
            actions: [H, a], unnormalized, without padding.
            state: [s], the "state" returned by `to_model`.
        """
        self._check_actions(actions)
        if any(self.action_mask):
            actions = absolute_actions(actions, state, self.action_mask)
        return HOOKS[self.hook].actions_to_robot(actions) if self.hook else actions

    def example_observation(
        self, *, state_dim: int | None = None, state: Float[np.ndarray, " s"] | None = None
    ) -> dict[str, Any]:
        """Build a valid observation: noise images (the same in every call), a state and a prompt.

        Args:
            state_dim: length of the state, which is zero; by default the largest.
            state: use this state instead, in the model's units.
        """
        rng = np.random.default_rng(0)
        flat: dict[str, Any] = {camera.key: camera.example(rng) for camera in self.read_cameras if camera.key}
        values = np.zeros(len(self.state_names) if state_dim is None else state_dim)
        to_robot = HOOKS[self.hook].state_to_robot if self.hook else np.asarray
        if state is not None and to_robot is not None:
            values = to_robot(state)
        for part in self.state:  # only the last part may be shorter
            flat[part.key], values = values[: len(part.names)], values[len(part.names) :]
        flat["prompt"] = self.default_prompt or "pick up the object"
        return nest(flat)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values, which `from_dict` reads; unset limits and depth mappings are left out."""
        fields = dataclasses.asdict(dataclasses.replace(self, metadata=dict(self.metadata)))
        for part, optional in (("actions", LIMITS), ("cameras", ("depth",))):
            for entry in fields[part]:
                for name in optional:
                    if entry[name] is None:
                        del entry[name]
        if self.beyond_limits == "clip":
            del fields["beyond_limits"]
        try:
            return dict(json.loads(json.dumps(fields, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise EmbodimentError(f"Embodiment '{self.name}': metadata can't be written as JSON: {error}.") from error

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "embodiment") -> "Embodiment":
        """Invert `to_dict`; `where` names the document in messages."""
        return schema.parse(cls, data, where, error=EmbodimentError)

    def _check_keys(self, values: Mapping[str, Any]) -> None:
        cameras = {camera.key for camera in self.cameras if camera.key}
        known = cameras | {part.key for part in self.state} | {"prompt", "actions"}
        # Every key in a mapping that contains only cameras, such as "images", is meant as a camera.
        camera_groups = {_group(key) for key in cameras} - {_group(key) for key in known - cameras} - {""}
        unknown = [key for key in values if key not in known]
        unknown_cameras = [
            key for key in unknown if getattr(values[key], "ndim", 0) >= 3 or _group(key) in camera_groups
        ]
        if unknown_cameras:
            raise UnknownKeyError(
                f"Embodiment '{self.name}' has no camera {first_of([f'{key!r}' for key in unknown_cameras])}; "
                f"its cameras are {self._cameras_text()}. Rename it, leave it out, or add it to the embodiment "
                "(presence 'ignored' if the model should not read it)."
            )
        if unknown and not self._warned:  # type: ignore[attr-defined]
            object.__setattr__(self, "_warned", True)
            warnings.warn(
                f"Embodiment '{self.name}' ignores {first_of(unknown)} of the observation; "
                f"it reads {', '.join(sorted(known))}.",
                UserWarning,
                stacklevel=4,
            )

    def _cameras_text(self) -> str:
        return ", ".join(f"{camera.key} ({camera.presence})" for camera in self.cameras if camera.key)

    def _missing(self, label: str, verb: str, values: Mapping[str, Any], key: str | None) -> str:
        if key in values:
            return f"The observation's {label} is None, but embodiment '{self.name}' {verb} it; found {_listed(values)}"
        return f"The observation has no {label}, which embodiment '{self.name}' {verb}; found {_listed(values)}"

    def _images(self, values: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
        present: dict[str, np.ndarray] = {}
        for camera in self.read_cameras:
            value = None if camera.key is None else values.get(camera.key)
            if value is not None:
                present[str(camera.name)] = camera.read(value)
            elif camera.presence == "required":
                label = f"image '{camera.key}' (camera {camera.name})"
                raise UnknownKeyError(
                    f"{self._missing(label, 'requires', values, camera.key)}; expected {self._cameras_text()}. "
                    "Send it, or set the camera's presence to 'optional' in the embodiment."
                )
        if not present:
            raise UnknownKeyError(
                f"The observation has no image that embodiment '{self.name}' reads; found {_listed(values)}; expected "
                f"at least one of {self._cameras_text()}."
            )
        black = np.zeros_like(next(iter(present.values())))
        images = {name: present.get(name, black) for name in self.camera_names}
        return images, {name: name in present for name in self.camera_names}

    def _state(self, values: Mapping[str, Any], state_dim: int | None) -> np.ndarray:
        if missing := [part.key for part in self.state if values.get(part.key) is None]:
            label = f"state '{missing[0]}'"
            raise UnknownKeyError(
                f"{self._missing(label, 'reads', values, missing[0])}; expected "
                f"{', '.join(part.key for part in self.state)}."
            )
        parts = [part.read(values[part.key], self.name) for part in self.state]
        state = np.concatenate(parts) if parts else np.zeros(0)
        if state_dim is not None and len(state) != state_dim:
            raise EmbodimentError(
                f"The state has {counted(len(state), 'dimension')} ({', '.join(self.state_names[: len(state)])}), "
                f"but this policy expects {state_dim}. Send the state that it was trained with."
            )
        return state

    def _prompt(self, prompt: Any, default_prompt: str | None) -> str:
        if prompt is None:
            prompt = self.default_prompt if default_prompt is None else default_prompt
        if prompt is None:
            raise EmbodimentError(
                f"The observation has no prompt, and neither the policy nor embodiment '{self.name}' has a default. "
                'Send "prompt", or load the policy with default_prompt=, or start the server with --default-prompt.'
            )
        return as_text(prompt)

    def _check_actions(self, actions: np.ndarray) -> None:
        if actions.ndim != 2 or actions.shape[1] != self.action_size:
            raise EmbodimentError(
                f"Actions have shape {list(actions.shape)}; embodiment '{self.name}' expects [H, {self.action_size}]: "
                f"{', '.join(self.action_names)}."
            )


def _listed(values: Mapping[str, Any]) -> str:
    return first_of([*values]) or "nothing"


def _group(key: str) -> str:
    """Key of the mapping that contains a key."""
    return key.rpartition(".")[0]
