"""The data that crosses module borders, and the legend of its shapes.

Shape legend, used in every signature and comment:

    B  batch                 S  prefix tokens (images and prompt)     D  backbone width
    N  cameras               H  action horizon (actions in a chunk)   d  action expert width
    P  patches per image     T  suffix tokens                         Q  query heads
    L  prompt tokens         A  action_dim                            G  key/value heads
    h, w  image height and width in pixels                            K  head_dim
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
    """The number of tokens by which the prompt was cut to max_token_len; absent: it was not."""
    actions_clipped: NotRequired[int]
    """The number of values of the chunk that were clipped to the robot's limits; absent: none."""
    samples: NotRequired[np.ndarray]
    """float32 [N, H, a], all samples, in the robot's units and within its limits; with `num_samples`."""
    sample_index: NotRequired[int]
    """The one of `samples` that `actions` is."""
    velocity_residuals: NotRequired[np.ndarray]
    """float32 [N]: RMS of v_t − (x_1 − x_0) over steps and actions, normalized; 0: the path is straight. For N > 1."""
    action_std: NotRequired[np.ndarray]
    """float32 [H, a]: standard deviation over the samples (of N − 1), in the robot's units. For N > 1."""
    uncertainty: NotRequired[float]
    """The same as a fraction of the training range, q01 to q99, mean over actions and dimensions. For N > 1."""


@dataclasses.dataclass(frozen=True)
class PreviousChunk:
    """The rest of the chunk that the robot executes while a new one is computed, for real-time chunking."""

    actions: np.ndarray
    """[k, a] in the robot's units, from the moment of the new observation on."""
    delay: int | np.integer
    """d, the number of them that will have been executed when the new chunk arrives."""
    execution_horizon: int | np.integer | None = None
    """s, the number of steps executed since its own inference began; None: H − k, the actions that are missing."""
    method: Literal["trained", "guidance"] | None = None
    """"trained": the first `delay` actions are an action prefix, for a policy that was trained with such; "guidance":
    each Euler step is guided towards all of them; None: "trained" where the policy was for such a delay, or else
    "guidance". See `model.rtc`."""

    def __post_init__(self) -> None:
        for name in ("delay", "execution_horizon") if self.execution_horizon is not None else ("delay",):
            value = getattr(self, name)
            if not is_whole(value):
                raise ObservationError(f"{name} is a number of actions, an integer; got {value!r}. Round a delay up.")
            object.__setattr__(self, name, int(value))  # NumPy's small integers overflow
        if self.method not in (None, "trained", "guidance"):
            raise ObservationError(f"method is {self.method!r}; expected 'trained', 'guidance' or None.")

    def steps_executed(self, horizon: int) -> int:
        """s, for chunks of H actions."""
        executed = max(horizon - len(self.actions), 0) if self.execution_horizon is None else self.execution_horizon
        if not 0 <= executed <= horizon or not 0 <= self.delay <= horizon - executed:
            raise ObservationError(
                f"Real-time chunking needs 0 ≤ delay ≤ H − execution_horizon, got delay {self.delay}, "
                f"execution_horizon {executed} and H {horizon}: the chunk that is being executed ends before the new "
                "one arrives. Ask sooner, or without a prefix."
            )
        sent, left = len(self.actions), horizon - executed
        if not self.delay <= sent <= left:
            raise ObservationError(
                f"The action prefix has {sent} actions; expected at least delay, {self.delay}, and at most the {left} "
                f"that a chunk of {horizon} has left after {executed} (execution_horizon)."
            )
        return int(executed)


@dataclasses.dataclass(frozen=True)
class Observation:
    """A batch of model inputs. The cameras' order is their order in the prefix."""

    images: dict[str, Float32[Tensor, "B h w 3"]]
    """Per camera, RGB in [-1, 1]."""
    image_masks: dict[str, Bool[Tensor, " B"]]
    """Per camera, False where the sample has no such image; the same keys as `images`, in the same order."""
    state: Float32[Tensor, "B A"]
    """Normalized and padded. π₀ reads it as a token; π₀.₅ has it in the prompt's text and does not read it here."""
    tokenized_prompt: Int[Tensor, "B L"]
    """Token ids; those of padding do not matter."""
    tokenized_prompt_mask: Bool[Tensor, "B L"]
    """True at valid tokens."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Observation":
        """Build an observation from a nested dict of tensors, which is not changed.

        Args:
            data: {"image": {camera: uint8 [B, h, w, 3], or float32 in [-1, 1]}, "image_mask": {camera: bool [B]},
                "state": [B, A], "tokenized_prompt": [B, L], "tokenized_prompt_mask": bool [B, L]}. Cameras without an
                entry in "image_mask" are present in every sample.

        Raises:
            KeyError: a key is missing, or a mask has no camera.
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
        present = torch.ones(batch, dtype=torch.bool, device=state.device)
        images = {name: _image(image, name, batch) for name, image in images.items()}
        sizes = {name: list(image.shape[1:3]) for name, image in images.items()}
        if len({tuple(size) for size in sizes.values()}) > 1:
            raise ObservationError(
                f"All images must have one size, got {sizes}; resize_with_pad brings them to the model's."
            )
        return cls(
            images=images,
            image_masks={name: _mask(masks.get(name, present), f"image_mask[{name!r}]", (batch,)) for name in images},
            state=state.to(torch.float32),
            # Many pad with -1, which no embedding has.
            tokenized_prompt=tokens.to(torch.int64).masked_fill(~token_mask & (tokens < 0), 0),
            tokenized_prompt_mask=token_mask,
        )

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    def to(self, device: str | torch.device) -> "Observation":
        """The same observation on another device."""
        return Observation(**tree_map(lambda tensor: tensor.to(device), vars(self)))


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
            "images with channels first: use .permute(0, 2, 3, 1)."
        )
    if image.dtype is torch.uint8:
        return image.to(torch.float32) / 255.0 * 2.0 - 1.0
    if image.dtype is torch.float32:
        # LeRobot 0.4's bars are -3. A GPU's values are not read here; NaN may stand in an absent camera's image.
        if image.device.type == "cpu" and bool((image.abs() > 3).any()):
            raise ObservationError(
                f"image[{camera!r}] has values from {image.min():.4g} to {image.max():.4g}; expected float32 in "
                "[-1, 1]. Pass pixels of 0 to 255 as uint8."
            )
        return image
    raise ObservationError(f"image[{camera!r}] must be uint8, or float32 in [-1, 1], got {image.dtype}.")
