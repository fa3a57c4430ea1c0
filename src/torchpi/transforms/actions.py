"""Action transforms: absolute and delta actions, padding to the model's width, and their inverses."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from torchpi.errors import TransformError


def delta_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> Shaped[np.ndarray, "... a"]:
    """Convert the masked dimensions to deltas: relative to the state at the beginning of the chunk, not to the previous
    action.

    Args:
        actions: [..., a], usually [H, a].
        state: [s], in the same units.
        mask: True for delta dimensions; if shorter than a, the remaining dimensions stay absolute.

    Raises:
        ValueError: the mask is longer than the actions, or the state lacks a delta dimension.
    """
    return actions - _offset(actions, state, mask)


def absolute_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> Shaped[np.ndarray, "... a"]:
    """Invert `delta_actions`."""
    return actions + _offset(actions, state, mask)


def _offset(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    relative = np.flatnonzero(mask)
    needed = int(relative.max(initial=-1)) + 1  # the state may be narrower than the actions if the rest is absolute
    if len(mask) > actions.shape[-1] or needed > state.shape[-1]:
        raise TransformError(
            f"Delta actions: the mask has {len(mask)} dimensions, the last delta is dimension number {needed}, actions "
            f"have {actions.shape[-1]} and the state has {state.shape[-1]} dimensions; expected a mask that is no "
            "longer than the actions, and a state that has all delta dimensions."
        )
    offset = np.zeros(actions.shape[-1], state.dtype)  # [a]
    offset[relative] = state[relative]
    return offset


def pad_to_dim(x: np.ndarray, dim: int) -> Shaped[np.ndarray, "... d"]:
    """Pad the last axis with zeros to `dim` entries; wider arrays are returned unchanged."""
    missing = dim - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing > 0 else x


def unpad(x: np.ndarray, dim: int) -> Shaped[np.ndarray, "... {dim}"]:
    """Cut the last axis to its first `dim` entries.

    Raises:
        ValueError: it has fewer.
    """
    if x.shape[-1] < dim:
        raise TransformError(
            f"Cannot cut an array with {x.shape[-1]} dimensions to {dim}; is the model's action_dim too small?"
        )
    return x[..., :dim]


def bool_mask(*runs: int) -> tuple[bool, ...]:
    """Build a mask from run lengths: bool_mask(6, -1) is True six times, then False once."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))
