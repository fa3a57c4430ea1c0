"""A robot as data: its cameras, its state and its actions, in the order in which a policy was trained with them."""

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
    """The arguments of `Embodiment.generic`, for a check of their types."""

    cameras: dict[str, str]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    delta: tuple[str, ...]
    command: str | dict[str, str | None] | None
    limits: dict[str, dict[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot: what it sends, what the model reads of it, and what it is sent back.

    A robot of your own needs no code:

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

    `command` says what the robot does with an action; the control loop holds the robot still by it.

    Its observations are {"front": uint8 [h, w, 3], "wrist": uint8 [h, w, 3], "state": [4], "prompt": str}.

    Raises:
        ValueError: fields that contradict each other.
    """

    name: str
    """Name, shown in messages."""
    cameras: tuple[Camera, ...]
    """In the order in which the model reads them."""
    state: tuple[StateKey, ...]
    """The parts of the state vector, in order; none: the policy reads no state."""
    actions: tuple[ActionDim, ...]
    """The dimensions of an action, in order."""
    hook: str | None = None
    """Name of code in `HOOKS` that converts units; None: the robot's units are the model's."""
    control_hz: float | int | None = None
    """Actions per second that the robot executes."""
    execute_steps: int | None = None
    """Recommended number of a chunk's actions to execute before asking for the next chunk."""
    default_prompt: str | None = None
    """The instruction of a request that has none."""
    beyond_limits: str = "clip"
    """Treatment of actions below `low` or above `high` of their dimension: "clip" them, and count them in the answer;
    "refuse" the chunk; "send" them, as openpi does, to robots and control loops that keep the limits themselves."""
    asset_id: str | None = None
    """The name of the checkpoint's statistics for this robot: assets/<asset_id>."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Whatever clients want to know; JSON."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_warned", False)
        for field in ("cameras", "state", "actions"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if problem := self._contradiction():
            raise EmbodimentError(f"Embodiment '{self.name}': {problem}")

    def _contradiction(self) -> str | None:
        """The first problem of the fields; None: there is none."""
        if not (self.read_cameras and self.actions):
            return "expected at least one camera that is read and one action."
        keys = [camera.key for camera in self.cameras if camera.key] + [part.key for part in self.state]
        for label, values in (("camera name", list(self.camera_names)), ("key", keys)):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                return f"{label} {', '.join(twice)} occurs more than once."
        if any(part.min_dim not in (None, len(part.names)) for part in self.state[:-1]):
            return "only the last state may be shorter, or the dimensions would move."
        if beyond := [action.name for action in self.actions[self.state_dims[0] :] if action.kind == "delta"]:
            has = f"may have only {counted(self.state_dims[0], 'dimension')}" if self.state else "has none"
            return (
                f"the actions {', '.join(beyond)} are deltas, but the state {has}; a delta refers to the state of its "
                "index."
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
            return f"execute_steps is {steps}; expected a positive number, and a whole one."
        return None

    def check_names(self, where: str | None = None) -> None:
        """Raise an EmbodimentError for names that occur twice, and for a delta that has the name of another state.

        Not in the constructor: a trained policy is loaded as it is, with a warning.
        """
        where, states = where or f"Embodiment '{self.name}'", self.state_names
        lists = {"actions": self.action_names, **{f"names of state {part.key!r}": part.names for part in self.state}}
        for label, names in lists.items():
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise EmbodimentError(
                    f"{where}: the {label} have {', '.join(twice)} more than once; rename all but one."
                )
        for i, action in enumerate(self.actions):
            if action.kind == "delta" and action.name in states and states[i] != action.name:
                raise EmbodimentError(
                    f"{where}: action {action.name!r} is a delta at index {i}, but the state has {action.name!r} at "
                    f"index {states.index(action.name)} and {states[i]!r} at {i}; it would be taken between different "
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
        """A robot without conversions, all of whose cameras are required and uint8 [h, w, 3].

        Args:
            cameras: the model's camera name to the observation's key, in the model's order.
            state, actions: the names of the dimensions; no state: [].
            delta: which of the actions the model predicts relative to the state.
            command: what the robot takes, see `ActionDim`: one for all actions, or per action.
            limits: per action what of "low", "high" and "max_step" is known, see `ActionDim`.
            state_key: where the state vector is in the observation.
            fields: further fields of the embodiment (control_hz, default_prompt, …).

        Raises:
            ValueError: an argument of another form; delta, command or limits of an action that there isn't; names that
                occur twice; a delta whose name the state has at another index; what the constructor raises.
        """
        label = f"Embodiment '{name}'"
        given = {"cameras": cameras, "state": state, "actions": actions, "delta": delta, "command": command}
        of = schema.parse(_Generic, given | {"limits": limits}, label, error=EmbodimentError)
        commands = dict.fromkeys(of.actions, of.command) if isinstance(of.command, str) else of.command or {}
        limits = of.limits or {}
        for field, some in (("delta", of.delta), ("command", commands), ("limits", limits)):
            if unknown := [action for action in some if action not in of.actions]:
                raise EmbodimentError(f"{label}: {field} names {unknown}; expected some of {list(of.actions)}.")
        if unknown := sorted({field for limit in limits.values() for field in limit} - set(LIMITS)):
            raise EmbodimentError(f"{label}: limits have {unknown}; expected {', '.join(LIMITS)}.")
        dimensions = []
        for action in of.actions:
            kind = "delta" if action in of.delta else "absolute"
            dimensions.append(ActionDim(action, "", kind, commands.get(action), **limits.get(action, {})))
        robot = cls(
            name,
            cameras=tuple(Camera(model_name, key) for model_name, key in of.cameras.items()),
            state=(StateKey(state_key, of.state),) if of.state else (),
            actions=tuple(dimensions),
            **fields,
        )
        robot.check_names()
        return robot

    @property
    def read_cameras(self) -> tuple[Camera, ...]:
        """The cameras that the model reads, in its order."""
        return tuple(camera for camera in self.cameras if camera.presence != "ignored")

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The model's names of the cameras that it reads, in its order."""
        return tuple(camera.name for camera in self.read_cameras if camera.name is not None)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.state for name in part.names)

    @property
    def state_units(self) -> tuple[str, ...]:
        """The units of the state's dimensions, of all parts; "": not stated."""
        return tuple(unit for part in self.state for unit in part.units or ("",) * len(part.names))

    @property
    def action_names(self) -> tuple[str, ...]:
        return tuple(action.name for action in self.actions)

    @property
    def action_units(self) -> tuple[str, ...]:
        """The units of an action's dimensions; "": not stated."""
        return tuple(action.unit for action in self.actions)

    @property
    def state_dims(self) -> range:
        """The lengths that the state may have."""
        return range(sum(part.dims[0] for part in self.state), len(self.state_names) + 1)

    @property
    def action_size(self) -> int:
        """a: the number of dimensions of an action."""
        return len(self.actions)

    @property
    def action_mask(self) -> tuple[bool, ...]:
        """The action dimensions that are relative to the state for the model."""
        return tuple(action.kind == "delta" for action in self.actions)

    @property
    def observation_format(self) -> dict[str, Any]:
        """The form of an observation for a client: the keys of "cameras", with layout, dtype, presence and the unit of
        depths, and of the parts of the "state", with the names and units of their dimensions; the instruction's is
        "prompt"."""
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
        """ "low", "high" and "max_step" of each dimension of an action; None: not stated, or nothing is at all."""
        limits = {field: [getattr(action, field) for action in self.actions] for field in LIMITS}
        return limits if any(value is not None for values in limits.values() for value in values) else None

    def to_model(
        self, observation: Any, *, default_prompt: str | None = None, state_dim: int | None = None
    ) -> dict[str, Any]:
        """An observation of the robot as a sample in the model's terms; the argument is not changed.

        Args:
            observation: the robot's own keys, nested, or flat with '.' between them. In training also "actions"
                [H, a] in the robot's units.
            default_prompt: for an observation without "prompt"; None: the embodiment's.
            state_dim: the only length of state to take, of those that the embodiment allows.

        Returns:
            "image" {camera: uint8 [h, w, 3]} and "image_mask" {camera: bool} in the embodiment's order, black and False
            for an absent camera; "state" [s] in the model's units; "prompt" str; "actions" [H, a] in the model's units,
            relative to the state where they are deltas, if given.

        Raises:
            KeyError: a required camera or a part of the state is missing, or there is an unknown camera.
            ValueError: a value of another form, NaN or infinity; no prompt. Other unknown keys warn once per object.
        """
        if not isinstance(observation, Mapping):
            raise EmbodimentError(
                f"An observation is a dict with the robot's keys; found a {type(observation).__name__}."
            )
        found = flatten(observation)
        self._check_keys(found)
        image, image_mask = self._images(found)
        state = self._state(found, state_dim)
        hook = HOOKS[self.hook] if self.hook else None
        sample: dict[str, Any] = {
            "image": image,
            "image_mask": image_mask,
            "state": hook.state_to_model(state) if hook and self.state else state,
            "prompt": self._prompt(found.get("prompt"), default_prompt),
        }
        if found.get("actions") is not None:
            actions = numbers(found["actions"], "actions")
            self._check_actions(actions)
            require_finite(actions, "actions", self.action_names)
            actions = hook.actions_to_model(actions) if hook else actions
            is_delta = any(self.action_mask)
            sample["actions"] = delta_actions(actions, sample["state"], self.action_mask) if is_delta else actions
        return sample

    def from_model(self, actions: np.ndarray, state: np.ndarray) -> Float[np.ndarray, "H a"]:
        """The model's actions in the robot's terms.

        Args:
            actions: [H, a], unnormalized, without padding.
            state: [s], the "state" that `to_model` returned.
        """
        self._check_actions(actions)
        if any(self.action_mask):
            actions = absolute_actions(actions, state, self.action_mask)
        return HOOKS[self.hook].actions_to_robot(actions) if self.hook else actions

    def example_observation(
        self, *, state_dim: int | None = None, state: Float[np.ndarray, " s"] | None = None
    ) -> dict[str, Any]:
        """A request that `to_model` takes: the same noise images at every call, and a prompt.

        Args:
            state_dim: length of a state of zeros; by default the largest.
            state: in the model's units, in place of zeros.
        """
        rng, to_robot = np.random.default_rng(0), HOOKS[self.hook].state_to_robot if self.hook else np.asarray
        flat: dict[str, Any] = {camera.key: camera.example(rng) for camera in self.read_cameras if camera.key}
        values = np.zeros(len(self.state_names) if state_dim is None else state_dim)
        if state is not None and to_robot is not None:
            values = to_robot(state)
        for part in self.state:  # only the last part may be shorter
            flat[part.key], values = values[: len(part.names)], values[len(part.names) :]
        flat["prompt"] = self.default_prompt or "pick up the object"
        return nest(flat)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, but for limits and mappings of depth that there aren't; `from_dict` reads it."""
        fields = dataclasses.asdict(dataclasses.replace(self, metadata=dict(self.metadata)))
        for part, optional in (("actions", LIMITS), ("cameras", ("depth",))):
            for row in fields[part]:
                for name in [name for name in optional if row[name] is None]:
                    del row[name]
        if self.beyond_limits == "clip":
            del fields["beyond_limits"]
        try:
            return dict(json.loads(json.dumps(fields, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise EmbodimentError(f"Embodiment '{self.name}': metadata can't be written as JSON: {error}.") from error

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "embodiment") -> "Embodiment":
        """Read what `to_dict` wrote; `where` is the document's name for messages."""
        return schema.parse(cls, data, where, error=EmbodimentError)

    def _check_keys(self, found: Mapping[str, Any]) -> None:
        cameras = {camera.key for camera in self.cameras if camera.key}
        known = cameras | {part.key for part in self.state} | {"prompt", "actions"}
        # A mapping in which only cameras are expected, such as "images": whatever else is in there is meant as a
        # camera.
        folders = {_folder(key) for key in cameras} - {_folder(key) for key in known - cameras} - {""}
        unknown = [key for key in found if key not in known]
        unknown_cameras = [key for key in unknown if getattr(found[key], "ndim", 0) >= 3 or _folder(key) in folders]
        if unknown_cameras:
            raise UnknownKeyError(
                f"Embodiment '{self.name}' has no camera {first_of([f'{key!r}' for key in unknown_cameras])}; "
                f"its cameras are {self._cameras_text()}. Rename it, leave it out, or add it to the embodiment "
                "(presence 'ignored' if the model shall not read it)."
            )
        if unknown and not self._warned:  # type: ignore[attr-defined]
            object.__setattr__(self, "_warned", True)
            warnings.warn(
                f"Embodiment '{self.name}' doesn't read {first_of(unknown)} of the observation; "
                f"it knows {', '.join(sorted(known))}.",
                UserWarning,
                stacklevel=4,
            )

    def _cameras_text(self) -> str:
        return ", ".join(f"{camera.key} ({camera.presence})" for camera in self.cameras if camera.key)

    def _absent(self, label: str, verb: str, found: Mapping[str, Any], key: str | None) -> str:
        if key in found:
            return f"The observation's {label} is None, but embodiment '{self.name}' {verb} it; found {_listed(found)}"
        return f"The observation has no {label}, which embodiment '{self.name}' {verb}; found {_listed(found)}"

    def _images(self, found: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
        present: dict[str, np.ndarray] = {}
        for camera in self.read_cameras:
            value = None if camera.key is None else found.get(camera.key)
            if value is not None:
                present[str(camera.name)] = camera.read(value)
            elif camera.presence == "required":
                label = f"image '{camera.key}' (camera {camera.name})"
                raise UnknownKeyError(
                    f"{self._absent(label, 'requires', found, camera.key)}; expected {self._cameras_text()}. "
                    "Send it, or state it as optional (presence of the camera in the embodiment)."
                )
        if not present:
            raise UnknownKeyError(
                f"The observation has no image that embodiment '{self.name}' reads; found {_listed(found)}; expected "
                f"at least one of {self._cameras_text()}."
            )
        black = np.zeros_like(next(iter(present.values())))
        images = {name: present.get(name, black) for name in self.camera_names}
        return images, {name: name in present for name in self.camera_names}

    def _state(self, found: Mapping[str, Any], state_dim: int | None) -> np.ndarray:
        if missing := [part.key for part in self.state if found.get(part.key) is None]:
            label = f"state '{missing[0]}'"
            raise UnknownKeyError(
                f"{self._absent(label, 'reads', found, missing[0])}; expected "
                f"{', '.join(part.key for part in self.state)}."
            )
        parts = [part.read(found[part.key], self.name) for part in self.state]
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


def _listed(found: Mapping[str, Any]) -> str:
    return first_of([*found]) or "nothing"


def _folder(key: str) -> str:
    return key.rpartition(".")[0]
