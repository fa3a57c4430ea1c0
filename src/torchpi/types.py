"""Data types shared by all modules: observations and action chunks.

Shape legend, used in every signature and comment:

    B  batch                 S  prefix tokens (images and prompt)     D  backbone width
    N  cameras               H  action horizon (actions in a chunk)   d  action expert width
    P  patches per image     T  suffix tokens                         Q  query heads
    L  prompt tokens         A  action_dim                            G  key/value heads
    R  samples per observation (of noise and time, or of chunks)      K  head_dim
    a  robot's action dimensions       s  robot's state dimensions    k  actions left of a chunk
    h, w  image height and width in pixels
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from torchpi.errors import ObservationError, UnknownKeyError, is_whole


class ActionChunk(TypedDict):
    """The result of `Policy.infer`."""

    actions: np.ndarray
    """float32 [H, a], in the robot's units."""
    policy_timing: dict[str, float]
    """Milliseconds per stage."""
    prompt_tokens_cut: NotRequired[int]
    """Number of tokens cut from the prompt to fit max_token_len; absent if nothing was cut."""
    actions_clipped: NotRequired[int]
    """Number of values that were clipped to the robot's limits; absent if there were none."""
    samples: NotRequired[np.ndarray]
    """float32 [R, H, a]: all samples, in the robot's units and within its limits. Only with `num_samples`."""
    sample_index: NotRequired[int]
    """Index of `actions` in `samples`."""
    velocity_residuals: NotRequired[np.ndarray]
    """float32 [R]: RMS of v_t − (x_1 − x_0) over steps and actions, normalized; 0 for a straight path. For R > 1."""
    action_std: NotRequired[np.ndarray]
    """float32 [H, a]: standard deviation over the samples (divided by R − 1), in the robot's units. For R > 1."""
    uncertainty: NotRequired[float]
    """`action_std` as a fraction of the training range (q01 to q99), averaged over the chunk. For R > 1."""


@dataclasses.dataclass(frozen=True)
class PreviousChunk:
    """The actions that the robot still has to execute while a new chunk is computed (real-time chunking)."""

    actions: np.ndarray
    """[k, a] in the robot's units; the first one belongs to the time of the new observation."""
    delay: int | np.integer
    """Number of these actions that will have been executed when the new chunk arrives."""
    execution_horizon: int | np.integer | None = None
    """Number of actions of this chunk executed since its inference began; None: H − k."""
    method: Literal["trained", "guidance"] | None = None
    """"trained" conditions the model on the first `delay` actions, for policies trained with an action prefix;
    "guidance" steers each Euler step towards all `actions`. None: "trained" if the policy was trained with prefixes as
    long as `delay`, otherwise "guidance". See `model.rtc`."""

    def __post_init__(self) -> None:
        for name in ("delay", "execution_horizon"):
            value = getattr(self, name)
            if name == "execution_horizon" and value is None:
                continue
            if not is_whole(value):
                raise ObservationError(f"{name} must be a whole number of actions, got {value!r}. Round a delay up.")
            object.__setattr__(self, name, int(value))  # small NumPy integer dtypes would overflow
        if self.method not in (None, "trained", "guidance"):
            raise ObservationError(f"method is {self.method!r}; expected 'trained', 'guidance' or None.")

    def steps_executed(self, horizon: int) -> int:
        """Number of actions of this chunk executed since its inference began, for chunks of H actions."""
        executed = max(horizon - len(self.actions), 0) if self.execution_horizon is None else self.execution_horizon
        if not 0 <= executed <= horizon or not 0 <= self.delay <= horizon - executed:
            raise ObservationError(
                f"Real-time chunking needs 0 ≤ delay ≤ H − execution_horizon, got delay {self.delay}, "
                f"execution_horizon {executed} and H {horizon}: the chunk that is being executed ends before the new "
                "one arrives. Request the new chunk sooner, or without a prefix."
            )
        if not self.delay <= len(self.actions) <= horizon - executed:
            raise ObservationError(
                f"The action prefix has {len(self.actions)} actions; expected at least delay, {self.delay}, and at "
                f"most the {horizon - executed} that a chunk of {horizon} has left after {executed} "
                "(execution_horizon)."
            )
        return int(executed)


@dataclasses.dataclass(frozen=True)
class Observation:
    """A batch of model inputs. The order of `images` is the order of the cameras in the prefix."""

    images: dict[str, Float32[Tensor, "B h w 3"]]
    """RGB in [-1, 1], per camera."""
    image_masks: dict[str, Bool[Tensor, " B"]]
    """False where a sample lacks the image; same keys as `images`, in the same order."""
    state: Float32[Tensor, "B A"]
    """Normalized and padded. π₀ reads it as a token; π₀.₅ has it in the prompt text and ignores this field."""
    tokenized_prompt: Int[Tensor, "B L"]
    """Token ids; ids of padding are arbitrary."""
    tokenized_prompt_mask: Bool[Tensor, "B L"]
    """True at valid tokens."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Observation":
        """Build an observation from a nested dict of tensors. The dict is not changed.

        Args:
            data: {"image": {camera: uint8 [B, h, w, 3], or float32 in [-1, 1]}, "image_mask": {camera: bool [B]},
                "state": [B, A], "tokenized_prompt": [B, L], "tokenized_prompt_mask": bool [B, L]}. A camera without an
                entry in "image_mask" is present in every sample.

        Raises:
            KeyError: a key is missing, or "image_mask" names an unknown camera.
            ValueError: a tensor has the wrong dtype, layout or batch size.
        """
        for key in ("image", "state", "tokenized_prompt", "tokenized_prompt_mask"):
            if key not in data:
                raise UnknownKeyError(f"observation has no {key!r}; it has {sorted(data)}.")
        images, masks = _cameras(data["image"], "image"), _cameras(data.get("image_mask", {}), "image_mask")
        if not images:
            raise ObservationError("observation['image'] is empty; at least one camera is needed.")
        if set(masks) - set(images):
            raise UnknownKeyError(f"image_mask names cameras without an image: {sorted(set(masks) - set(images))}.")
        state = _tensor(data["state"], "state", 2)
        batch = state.shape[0]
        tokens = _tensor(data["tokenized_prompt"], "tokenized_prompt", 2)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
            raise ObservationError(f"tokenized_prompt must hold integer token ids, got {tokens.dtype}.")
        token_mask = _mask(data["tokenized_prompt_mask"], "tokenized_prompt_mask", tokens.shape)
        if tokens.shape[0] != batch:
            raise ObservationError(
                f"state has batch size {batch}, tokenized_prompt {tokens.shape[0]}; they must agree."
            )
        all_present = torch.ones(batch, dtype=torch.bool, device=state.device)
        masks = {name: _mask(masks.get(name, all_present), f"image_mask[{name!r}]", (batch,)) for name in images}
        images = {name: _image(image, name, batch) for name, image in images.items()}
        sizes = {name: list(image.shape[1:3]) for name, image in images.items()}
        if len({tuple(size) for size in sizes.values()}) > 1:
            raise ObservationError(
                f"All images must have the same size, got {sizes}; resize_with_pad resizes them to the model's."
            )
        return cls(
            images=images,
            image_masks=masks,
            state=state.to(torch.float32),
            # Some pad with -1, which is not a valid embedding index.
            tokenized_prompt=tokens.to(torch.int64).masked_fill(~token_mask & (tokens < 0), 0),
            tokenized_prompt_mask=token_mask,
        )

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    def to(self, device: str | torch.device) -> "Observation":
        """Copy the observation to another device."""
        return Observation(**tree_map(lambda tensor: tensor.to(device), vars(self)))


def require_observation(value: Any) -> None:
    """Raise an ObservationError unless `value` is an Observation."""
    if not isinstance(value, Observation):
        raise ObservationError(
            f"The model's observation must be an Observation, got {type(value).__name__}; Observation.from_dict makes "
            "one from tensors, and Policy.infer takes a robot's observation."
        )


def _cameras(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ObservationError(f"observation[{name!r}] must map cameras to tensors, got {type(value).__name__}.")
    return dict(value)


def _tensor(value: Any, name: str, ndim: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise ObservationError(
            f"{name} must be a torch tensor, got {type(value).__name__}; torch.from_numpy makes one."
        )
    if value.ndim != ndim:
        raise ObservationError(
            f"{name} must have {ndim} dimensions with the batch first, got shape {list(value.shape)}."
        )
    return value


def _mask(value: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    mask = _tensor(value, name, len(shape))
    if mask.dtype is not torch.bool or mask.shape != shape:
        raise ObservationError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}.")
    return mask


def _image(value: Any, camera: str, batch: int) -> Tensor:
    image = _tensor(value, f"image[{camera!r}]", 4)
    if image.shape[0] != batch or image.shape[-1] != 3:
        raise ObservationError(
            f"image[{camera!r}] must be [{batch}, h, w, 3] (channels last), got {list(image.shape)}; "
            "convert channels-first images with .permute(0, 2, 3, 1)."
        )
    if image.dtype is torch.uint8:
        return image.to(torch.float32) / 255.0 * 2.0 - 1.0
    if image.dtype is torch.float32:
        # LeRobot 0.4 pads with -3. Values on a GPU are not checked (no sync). The image of an absent camera may be NaN.
        if image.device.type == "cpu" and bool((image.abs() > 3).any()):
            raise ObservationError(
                f"image[{camera!r}] has values from {image.min():.4g} to {image.max():.4g}; expected float32 in "
                "[-1, 1]. Pass pixels from 0 to 255 as uint8."
            )
        return image
    raise ObservationError(f"image[{camera!r}] must be uint8, or float32 in [-1, 1], got {image.dtype}.")
