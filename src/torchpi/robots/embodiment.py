"""A robot as data: its cameras, its state and its actions, in the order in which a policy was trained with them."""

import dataclasses
import json
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.errors import EmbodimentError, UnknownKeyError
from torchpi.transforms.actions import absolute_actions, delta_actions
from torchpi.transforms.images import DTYPES, LAYOUTS, to_uint8_hwc
from torchpi.transforms.normalize import require_finite
from torchpi.transforms.prompt import as_text

PRESENCES = ("required", "optional", "masked", "ignored")
KINDS = ("absolute", "delta")
LIMITS = ("low", "high", "max_step")
"""The fields of an `ActionDim` that limit what the robot is sent."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera of the robot, of the model, or of both.

    Raises:
        ValueError: a field has none of its values, or the presence doesn't fit name and key.
    """

    name: str | None
    """The model's name for it; None if the model doesn't read it (presence "ignored")."""
    key: str | None
    """Its place in the observation, nested keys joined by '.' ("images.cam_high"); None if the robot doesn't have
    it."""
    presence: str = "required"
    """"required"; "optional": absent means masked; "masked": the model has this camera, the robot doesn't; "ignored":
    the robot may send it, the model doesn't read it."""
    layout: str = "hwc"
    """"hwc" [h, w, 3] or "chw" [3, h, w]."""
    dtype: str = "uint8"
    """"uint8"; "float32", in [0, 1]; "any": uint8 or floating-point in [0, 1]."""

    def __post_init__(self) -> None:
        who = f"Camera {self.name or self.key!r}"
        for field, allowed in (("presence", PRESENCES), ("layout", LAYOUTS), ("dtype", DTYPES)):
            if getattr(self, field) not in allowed:
                raise EmbodimentError(
                    f"{who}: {field} is {getattr(self, field)!r}; expected one of {', '.join(allowed)}."
                )
        if (self.key is None) != (self.presence == "masked"):
            raise EmbodimentError(
                f"{who}: presence {self.presence!r} with key {self.key!r}; exactly a masked camera has no key."
            )
        if self.name is None and self.presence != "ignored":
            raise EmbodimentError(f"{who}: presence {self.presence!r} without a name; only an ignored camera has none.")


@dataclasses.dataclass(frozen=True)
class StateKey:
    """One part of the state; the parts are concatenated in the embodiment's order.

    Raises:
        ValueError: no names; not a unit for each; min_dim isn't between 1 and the number of names.
    """

    key: str
    """Its place in the observation, nested keys joined by '.'."""
    names: tuple[str, ...]
    """One per dimension. The value is [d]; for a single dimension also a plain number."""
    min_dim: int | None = None
    """Fewest dimensions that may be sent, the last ones missing; None: all."""
    units: tuple[str, ...] = ()
    """One per dimension, or empty: not stated."""

    def __post_init__(self) -> None:
        for field in ("names", "units"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.names:
            raise EmbodimentError(f"State {self.key!r} has no names; expected one per dimension.")
        if self.units and len(self.units) != len(self.names):
            raise EmbodimentError(
                f"State {self.key!r} has {len(self.names)} names and {len(self.units)} units; expected as many."
            )
        if self.min_dim is not None and not 1 <= self.min_dim <= len(self.names):
            raise EmbodimentError(f"State {self.key!r}: min_dim {self.min_dim}; expected 1 to {len(self.names)}.")

    @property
    def dims(self) -> range:
        """The lengths that it may have."""
        return range(self.min_dim or len(self.names), len(self.names) + 1)


@dataclasses.dataclass(frozen=True)
class ActionDim:
    """One dimension of an action.

    Raises:
        ValueError: an unknown kind; limits that are not finite, a low that is not below high, a max_step that is not
            positive.
    """

    name: str
    """For people and messages."""
    unit: str = ""
    """In which the robot takes it; empty: not stated."""
    kind: str = "absolute"
    """"delta": the model predicts the difference to the state of the same index at the beginning of the chunk;
    "absolute": it predicts what the robot takes, even if the robot reads that as an increment."""
    low: float | int | None = None
    """The least that the robot may be sent, in its units; None: not stated."""
    high: float | int | None = None
    """The most."""
    max_step: float | int | None = None
    """The largest change from one action to the next, at the embodiment's control rate; None: not stated."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EmbodimentError(f"Action {self.name!r}: kind is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        for field in LIMITS:
            if (value := getattr(self, field)) is not None and not math.isfinite(value):
                raise EmbodimentError(f"Action {self.name!r}: {field} is {value}; expected a finite number, or none.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise EmbodimentError(
                f"Action {self.name!r}: low is {self.low} and high {self.high}; low must be below high."
            )
        if self.max_step is not None and not self.max_step > 0:
            raise EmbodimentError(f"Action {self.name!r}: max_step is {self.max_step}; expected a positive number.")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Code for a robot whose units are not the model's; register it in `HOOKS` under the name that embodiments use."""

    state_to_model: Callable[[np.ndarray], np.ndarray]
    """[s] to [s]."""
    actions_to_model: Callable[[np.ndarray], np.ndarray]
    """[H, a] to [H, a], the inverse of actions_to_robot."""
    actions_to_robot: Callable[[np.ndarray], np.ndarray]
    """[H, a] to [H, a]."""


HOOKS: dict[str, Hook] = {}


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
            control_hz=30,
            execute_steps=15,
        )

    Its observations are {"front": uint8 [h, w, 3], "wrist": uint8 [h, w, 3], "state": [4], "prompt": str}.

    Raises:
        ValueError: fields that contradict each other.
    """

    name: str
    """For people and messages."""
    cameras: tuple[Camera, ...]
    """In the order in which the model reads them."""
    state: tuple[StateKey, ...]
    """The parts of the state vector, in order."""
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
    asset_id: str | None = None
    """Which of a checkpoint's statistics belong to this robot: assets/<asset_id>."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Whatever clients want to know; JSON."""
    _warned: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field in ("cameras", "state", "actions"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not (self.read_cameras and self.state and self.actions):
            raise EmbodimentError(
                f"Embodiment '{self.name}': expected at least one camera that is read, one state and one action."
            )
        keys = [camera.key for camera in self.cameras if camera.key] + [part.key for part in self.state]
        for what, values in (("camera name", [camera.name for camera in self.read_cameras]), ("key", keys)):
            if twice := sorted({value for value in values if value and values.count(value) > 1}):
                raise EmbodimentError(f"Embodiment '{self.name}': {what} {', '.join(twice)} occurs more than once.")
        if any(part.min_dim not in (None, len(part.names)) for part in self.state[:-1]):
            raise EmbodimentError(
                f"Embodiment '{self.name}': only the last state may be shorter, or the dimensions would move."
            )
        if beyond := [action.name for action in self.actions[self.state_dims[0] :] if action.kind == "delta"]:
            raise EmbodimentError(
                f"Embodiment '{self.name}': the actions {', '.join(beyond)} are deltas, but the state may have only "
                f"{self.state_dims[0]} dimensions; a delta refers to the state of its index."
            )
        if self.hook is not None and self.hook not in HOOKS:
            raise EmbodimentError(
                f"Embodiment '{self.name}': no hook {self.hook!r}; known are {sorted(HOOKS)}. "
                "Import the module that registers it in torchpi.robots.embodiment.HOOKS first."
            )
        for field in ("control_hz", "execute_steps"):
            if (value := getattr(self, field)) is not None and not value > 0:
                raise EmbodimentError(f"Embodiment '{self.name}': {field} is {value}; expected a positive number.")

    @classmethod
    def generic(
        cls,
        name: str,
        *,
        cameras: Mapping[str, str],
        state: Sequence[str],
        actions: Sequence[str],
        delta: Sequence[str] = (),
        limits: Mapping[str, Mapping[str, Any]] | None = None,
        state_key: str = "state",
        **fields: Any,
    ) -> "Embodiment":
        """A robot without conversions, all of whose cameras are required and uint8 [h, w, 3].

        Args:
            cameras: the model's camera name to the observation's key, in the model's order.
            state, actions: the names of the dimensions.
            delta: which of the actions the model predicts relative to the state.
            limits: per action what of "low", "high" and "max_step" is known, see `ActionDim`.
            state_key: where the state vector is in the observation.
            fields: further fields of the embodiment (control_hz, default_prompt, …).

        Raises:
            ValueError: a delta action or limits of one that isn't among the actions; what the constructor raises.
        """
        limits = limits or {}
        for what, names in (("delta", delta), ("limits", limits)):
            if unknown := [action for action in names if action not in actions]:
                raise EmbodimentError(f"Embodiment '{name}': {what} names {unknown}; expected some of {list(actions)}.")
        if unknown := sorted({field for limit in limits.values() for field in limit} - set(LIMITS)):
            raise EmbodimentError(f"Embodiment '{name}': limits have {unknown}; expected {', '.join(LIMITS)}.")
        return cls(
            name,
            cameras=tuple(Camera(model_name, key) for model_name, key in cameras.items()),
            state=(StateKey(state_key, tuple(state)),),
            actions=tuple(
                ActionDim(action, kind="delta" if action in delta else "absolute", **limits.get(action, {}))
                for action in actions
            ),
            **fields,
        )

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
        """The names of the state's dimensions, of all parts."""
        return tuple(name for part in self.state for name in part.names)

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
        """Which action dimensions are relative to the state for the model."""
        return tuple(action.kind == "delta" for action in self.actions)

    @property
    def observation_format(self) -> dict[str, Any]:
        """What an observation has to be, for whoever sends one: the keys of "cameras", with layout, dtype and presence,
        and of the parts of the "state", with the names of their dimensions; the instruction's is "prompt"."""
        fields = ("key", "layout", "dtype", "presence")
        return {
            "cameras": [
                {name: getattr(camera, name) for name in fields}
                for camera in self.read_cameras
                if camera.key is not None
            ],
            "state": [{"key": part.key, "names": list(part.names)} for part in self.state],
        }

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
            ValueError: an image of another layout or dtype; a state or action of another length; NaN or infinity; no
                prompt.

        Warns, once per object: about keys that are neither cameras nor known.
        """
        if not isinstance(observation, Mapping):
            raise EmbodimentError(
                f"An observation is a dict with the robot's keys; found a {type(observation).__name__}."
            )
        found = dict(_leaves(observation))
        self._check_keys(found)
        image, image_mask = self._images(found)
        state = self._state(found, state_dim)
        hook = HOOKS[self.hook] if self.hook else None
        sample: dict[str, Any] = {
            "image": image,
            "image_mask": image_mask,
            "state": hook.state_to_model(state) if hook else state,
            "prompt": self._prompt(found.get("prompt"), default_prompt),
        }
        if found.get("actions") is not None:
            actions = _numbers(found["actions"], "actions")
            self._check_actions(actions)
            require_finite(actions, "actions", [action.name for action in self.actions])
            actions = hook.actions_to_model(actions) if hook else actions
            sample["actions"] = (
                delta_actions(actions, sample["state"], self.action_mask) if any(self.action_mask) else actions
            )
        return sample

    def from_model(self, actions: np.ndarray, state: np.ndarray) -> Float[np.ndarray, "H a"]:
        """The model's actions in the robot's terms.

        Args:
            actions: [H, a], unnormalized, without padding.
            state: [s], the "state" that `to_model` returned.

        Raises:
            ValueError: actions of another length.
        """
        self._check_actions(actions)
        if any(self.action_mask):
            actions = absolute_actions(actions, state, self.action_mask)
        return HOOKS[self.hook].actions_to_robot(actions) if self.hook else actions

    def example_observation(self, *, state_dim: int | None = None) -> dict[str, Any]:
        """A request that `to_model` takes: the same noise images at every call, a state of zeros, a prompt.

        Args:
            state_dim: length of the state, of those that the embodiment allows; by default the longest.
        """
        rng = np.random.default_rng(0)
        flat: dict[str, Any] = {}
        for camera in self.read_cameras:
            if camera.key is not None:
                image = rng.integers(0, 256, (480, 640, 3), np.uint8)
                image = np.ascontiguousarray(np.moveaxis(image, -1, 0)) if camera.layout == "chw" else image
                flat[camera.key] = image.astype(np.float32) / 255 if camera.dtype == "float32" else image
        flat |= {part.key: np.zeros(len(part.names)) for part in self.state}
        if state_dim is not None:  # only the last part may be shorter
            last = self.state[-1]
            flat[last.key] = np.zeros(len(last.names) - (len(self.state_names) - state_dim))
        flat["prompt"] = self.default_prompt or "pick up the object"
        return nested(flat)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, but for limits that are not stated; `from_dict` reads it.

        Raises:
            ValueError: metadata that JSON can't hold.
        """
        fields = dataclasses.asdict(dataclasses.replace(self, metadata=dict(self.metadata)))
        del fields["_warned"]
        for action in fields["actions"]:
            for limit in LIMITS:
                if action[limit] is None:
                    del action[limit]
        try:
            return dict(json.loads(json.dumps(fields, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise EmbodimentError(f"Embodiment '{self.name}': metadata can't be written as JSON: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> "Embodiment":
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type; the message names it.
        """
        fields = _checked_fields(cls, data, "embodiment")
        for field, kind in (("cameras", Camera), ("state", StateKey), ("actions", ActionDim)):
            fields[field] = tuple(
                kind(**_checked_fields(kind, entry, f"embodiment.{field}[{i}]"))
                for i, entry in enumerate(fields[field])
            )
        return cls(**fields)

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
                f"Embodiment '{self.name}' has no camera {', '.join(map(repr, unknown_cameras))}; "
                f"its cameras are {self._cameras_text()}. Rename it, leave it out, or add it to the embodiment "
                "(presence 'ignored' if the model shall not read it)."
            )
        if unknown and "keys" not in self._warned:
            self._warned.add("keys")
            warnings.warn(
                f"Embodiment '{self.name}' doesn't read {', '.join(unknown)} of the observation; "
                f"it knows {', '.join(sorted(known))}.",
                UserWarning,
                stacklevel=4,
            )

    def _cameras_text(self) -> str:
        return ", ".join(f"{camera.key} ({camera.presence})" for camera in self.cameras if camera.key)

    def _images(self, found: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
        present: dict[str, np.ndarray] = {}
        for camera in self.read_cameras:
            value = None if camera.key is None else found.get(camera.key)
            if value is not None:
                label = f"{camera.name} ({camera.key})"
                present[str(camera.name)] = to_uint8_hwc(value, layout=camera.layout, dtype=camera.dtype, camera=label)
            elif camera.presence == "required":
                raise UnknownKeyError(
                    f"The observation has no image '{camera.key}' (camera {camera.name}), which embodiment "
                    f"'{self.name}' requires; found {_listed(found)}; expected {self._cameras_text()}. Send it, or "
                    "state it as optional (presence of the camera in the embodiment)."
                )
        if not present:
            raise UnknownKeyError(
                f"The observation has no image that embodiment '{self.name}' reads; found {_listed(found)}; expected "
                f"at least one of {self._cameras_text()}."
            )
        black = np.zeros_like(next(iter(present.values())))
        return (
            {name: present.get(name, black) for name in self.camera_names},
            {name: name in present for name in self.camera_names},
        )

    def _state(self, found: Mapping[str, Any], state_dim: int | None) -> np.ndarray:
        parts = []
        for part in self.state:
            if found.get(part.key) is None:
                raise UnknownKeyError(
                    f"The observation has no state '{part.key}', which embodiment '{self.name}' reads; "
                    f"found {_listed(found)}; expected {', '.join(p.key for p in self.state)}."
                )
            value = _numbers(found[part.key], f"state '{part.key}'")
            if value.ndim == 0 and len(part.names) == 1:
                value = value.reshape(1)
            if value.ndim != 1 or len(value) not in part.dims:
                lengths = " or ".join(map(str, part.dims))
                raise EmbodimentError(
                    f"State '{part.key}' has shape {list(value.shape)}; embodiment '{self.name}' expects {lengths} "
                    f"numbers: {', '.join(part.names)}."
                )
            require_finite(value, f"state '{part.key}'", part.names)
            parts.append(value)
        state = np.concatenate(parts)
        if state_dim is not None and len(state) != state_dim:
            raise EmbodimentError(
                f"The state has {len(state)} dimensions ({', '.join(self.state_names[: len(state)])}), "
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
                f"{', '.join(action.name for action in self.actions)}."
            )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(observation: Mapping[str, Any], key: str) -> Any:
    """What is at a key whose parts are joined by '.', nested, flat or any mix of both; None: nothing."""
    return dict(_leaves(observation)).get(key)


def _listed(found: Mapping[str, Any]) -> str:
    """The keys of an observation, for messages."""
    return ", ".join(found) or "nothing"


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of keys that are joined by '.'."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *folders, last = key.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def _folder(key: str) -> str:
    return key.rpartition(".")[0]


def _numbers(value: Any, what: str) -> np.ndarray:
    """A floating-point array; floats keep their dtype, because the state's text depends on it."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged lists
        raise EmbodimentError(f"Cannot read {what}: {error}") from error
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if array.dtype.kind != "f":
        raise EmbodimentError(f"Cannot read {what}: it has dtype {array.dtype}; expected numbers.")
    return array


def _checked_fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    """The arguments for a dataclass, out of JSON."""
    if not isinstance(data, Mapping):
        raise EmbodimentError(
            f"{where} is a {type(data).__name__}; expected an object with the fields of {cls.__name__}."
        )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(set(data) - set(fields)):
        raise EmbodimentError(f"{where} has unknown fields {unknown}; known are {list(fields)}.")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in data]:
        raise EmbodimentError(f"{where} lacks the fields {missing}; expected {required}.")
    hints = typing.get_type_hints(cls)
    for name, value in data.items():
        origin, args = typing.get_origin(hints[name]), typing.get_args(hints[name])
        if origin is tuple:
            # The entries of cameras, state and actions are objects, which the caller reads.
            valid = isinstance(value, list | tuple) and (args[0] is not str or all(isinstance(v, str) for v in value))
        else:
            valid = isinstance(value, hints[name] if origin in (None, types.UnionType) else origin)
        if not valid:
            raise EmbodimentError(f"{where}.{name} is {value!r}; expected {_type_text(hints[name])}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list" if typing.get_args(hint)[0] is not str else "a list of str"
    if typing.get_origin(hint) not in (None, types.UnionType):
        return "an object"
    return " or ".join("null" if t is type(None) else t.__name__ for t in typing.get_args(hint) or (hint,))
