"""Transforms between one sample in the model's units, from `Embodiment.to_model`, and the model's inputs: normalize,
tokenize, resize, pad, and the inverse for actions."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.errors import TransformError, UnknownKeyError, counted, first_of, listed
from torchpi.transforms.actions import pad_to_dim, unpad
from torchpi.transforms.images import OPENPI_IMAGES, ImageTransform, black_like, resize_with_pad
from torchpi.transforms.normalize import (
    Normalization,
    NormStats,
    constant_dims,
    normalize,
    require_finite,
    unnormalize,
)
from torchpi.transforms.prompt import Tokenizer, as_text, check_prompt_settings, prompt_text, tokenize_prompt

QUANTITIES = ("state", "actions")


@dataclasses.dataclass(frozen=True, eq=False)
class Transforms:
    """Transforms between an embodiment and the model, in both directions.

    Raises:
        KeyError: statistics or normalization lack "state" or "actions".
        ValueError: a rule needs quantiles but the statistics have none; unknown truncation.

    Warns (once per object) about dimensions in use whose statistics are constant, and about each prompt that is cut.
    """

    norm_stats: Mapping[str, NormStats]
    """Statistics of "state" and "actions"; other keys are ignored."""
    normalization: Mapping[str, Normalization]
    """Normalization rules of "state" and "actions"."""
    tokenizer: Tokenizer
    """Tokenizer that the model was trained with."""
    discrete_state_input: bool
    """True if the prompt contains the state as text (π₀.₅'s format), False for π₀'s format."""
    max_token_len: int | None
    """L; None: the prompt is neither padded nor cut."""
    action_dim: int
    """A: width to which state and actions are padded."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the model's images in pixels."""
    image_transform: ImageTransform = OPENPI_IMAGES
    """Filter and padding of the resize to `image_size`."""
    prompt_format: str = "openpi"
    """Format of π₀'s prompt, see `tokenize_prompt`."""
    truncation: str = "instruction"
    """Method of cutting a prompt that is too long, see `tokenize_prompt`."""
    prompt_state_dim: int | None = None
    """Width to which the state in the prompt is padded with zeros; None: no padding."""
    trained_action_dim: int | None = None
    """Number of trained action dimensions, None: all. The model's output is noise in the others, so they are set to
    the mean of their statistics."""
    names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Dimension names of "state" and "actions", for messages."""
    _constant: dict[str, list[int]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _warned: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_prompt_settings(self.prompt_format, self.truncation)
        for name, by_quantity in (("statistics", self.norm_stats), ("rule", self.normalization)):
            if missing := [key for key in QUANTITIES if key not in by_quantity]:
                raise UnknownKeyError(
                    f"Normalization: no {name} for {listed(missing)}; "
                    f"found {sorted(by_quantity)}, expected state and actions."
                )
        for key in QUANTITIES:
            self._constant[key] = constant_dims(self.norm_stats[key], self.normalization[key].kind, what=key)

    def forward(self, sample: Mapping[str, Any], *, state_noise: np.ndarray | None = None) -> dict[str, Any]:
        """Convert one sample from `Embodiment.to_model` to the model's inputs, without a batch axis.

        Args:
            sample: "image" {camera: uint8 [h, w, 3]}, "image_mask" {camera: bool}, "state" [s], "prompt" str and, in
                training, "actions" [H, a].
            state_noise: [s], added to the normalized state in training.

        Returns:
            "image" {camera: [h, w, 3], see `resize_with_pad`}, "image_mask" {camera: bool}, "state" [action_dim],
            "tokenized_prompt" int64 [L], "tokenized_prompt_mask" bool [L], "actions" [H, action_dim] if the sample has
            actions, and if the prompt was cut "prompt_tokens_cut" int, the number of missing tokens. State and actions
            are float64, or float32 with LeRobot's normalization. Cameras keep their order; an absent one is black.

        Raises:
            ValueError: NaN or infinity in state or actions; either is wider than its statistics or than action_dim;
                errors of `tokenize_prompt` and `resize_with_pad`.
        """
        state = self._normalize(sample["state"], "state")
        if state_noise is not None:
            state = state + state_noise
        # Tokenized before padding and casting: the text describes the state as the robot sent it.
        cut_messages: list[str] = []
        tokens, mask = self._tokenize(sample["prompt"], state, self.max_token_len, warn=cut_messages.append)
        size, resize = self.image_size, self.image_transform
        black = black_like(np.empty((*size, 3), resize.dtype))
        out: dict[str, Any] = {
            "image": {
                name: resize_with_pad(image, *size, resize) if sample["image_mask"][name] else black
                for name, image in sample["image"].items()
            },
            "image_mask": {name: np.bool_(present) for name, present in sample["image_mask"].items()},
            "state": pad_to_dim(state, self.action_dim),
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": mask,
        }
        if cut_messages:
            # Remembered by its hash, because prompts may be large.
            self._warn_once(f"prompt {hash(as_text(sample['prompt']))}", cut_messages[0])
            out["prompt_tokens_cut"] = self.num_prompt_tokens(sample["prompt"], state) - int(mask.sum())
        if "actions" in sample:
            out["actions"] = pad_to_dim(self._normalize(sample["actions"], "actions"), self.action_dim)
        return out

    def prompt_text(self, prompt: Any, state: np.ndarray) -> str:
        """Format the whole text of a prompt.

        Args:
            state: [s], normalized, not padded.
        """
        state = pad_to_dim(state, self.prompt_state_dim or 0)
        return prompt_text(
            prompt, state, discrete_state_input=self.discrete_state_input, prompt_format=self.prompt_format
        )

    def num_prompt_tokens(self, prompt: Any, state: np.ndarray) -> int:
        """Count the tokens of a prompt before it is cut."""
        return len(self._tokenize(prompt, state, None)[0])

    def _tokenize(
        self, prompt: Any, state: np.ndarray, max_token_len: int | None, warn: Callable[[str], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return tokenize_prompt(
            self.tokenizer,
            prompt,
            pad_to_dim(state, self.prompt_state_dim or 0),
            discrete_state_input=self.discrete_state_input,
            max_token_len=max_token_len,
            prompt_format=self.prompt_format,
            truncation=self.truncation,
            warn=warn,
        )

    def inverse(self, actions: np.ndarray, *, action_size: int) -> Float[np.ndarray, "H {action_size}"]:
        """Unnormalize the model's action chunk [H, action_dim] and remove the padding.

        Raises:
            ValueError: NaN or infinity in the chunk; action_size is wider than the chunk.
        """
        require_finite(actions, "the model's action chunk")
        stats, trained = self.norm_stats["actions"], self.trained_action_dim
        chunk = unpad(unnormalize(actions, stats, self.normalization["actions"], what="actions"), action_size)
        self._warn_about_constant_dims("actions", action_size)
        if trained is None or trained >= action_size:
            return chunk
        return np.where(np.arange(action_size) < trained, chunk, stats.mean[:action_size].astype(chunk.dtype))

    @property
    def untrained_actions(self) -> tuple[str, ...]:
        """Names of the robot's untrained action dimensions, see `checkpoints.sizes.adapt`."""
        first = self.action_dim if self.trained_action_dim is None else self.trained_action_dim
        return tuple(self.names.get("actions", ())[first:])

    def warn_about_untrained_actions(self) -> None:
        if self.untrained_actions:
            warnings.warn(
                f"This policy's actions {first_of(self.untrained_actions)} are untrained: the model's output for them "
                "is noise, so the robot gets the mean of the statistics instead. Train the policy on data of the robot "
                "(torchpi train --init) before the robot moves.",
                UserWarning,
                stacklevel=4,
            )

    def _normalize(self, value: Any, key: str) -> np.ndarray:
        x = np.asarray(value)
        require_finite(x, key)
        if x.shape[-1] > self.action_dim:
            raise TransformError(
                f"The {key} has {counted(x.shape[-1], 'dimension')}, but the model's action_dim is {self.action_dim}. "
                "Use a policy whose action_dim is large enough, or the embodiment that it was trained with."
            )
        self._warn_about_constant_dims(key, x.shape[-1])
        return normalize(x, self.norm_stats[key], self.normalization[key], what=key)

    def _warn_about_constant_dims(self, key: str, dim: int) -> None:
        # Only for dimensions in use: published statistics are as wide as the model, and constant in its padding.
        if dims := [i for i in self._constant[key] if i < dim]:
            names = self.names.get(key, ())
            dimensions = ", ".join(f"{i} ({names[i]})" if i < len(names) else str(i) for i in dims)
            self._warn_once(
                key,
                f"The statistics of {key} don't vary in dimension {dimensions}: any deviation from them there is "
                "divided by 1e-6. Check whether they belong to this robot.",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned and len(self._warned) < 1000:  # bounded, as clients may send any prompts
            self._warned.add(topic)
            warnings.warn(message, UserWarning, stacklevel=4)
