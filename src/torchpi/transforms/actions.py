"""Actions: absolute and relative to the state, padded to the model's width and back."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from torchpi.errors import TransformError


def delta_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> Shaped[np.ndarray, "... a"]:
    """Actions relative to the state at the beginning of the chunk (not to the step before) where the mask says so.

    Args:
        actions: [..., a], usually [H, a].
        state: [s], in the same units.
        mask: which dimensions; may be shorter than a, the rest then stays absolute.

    Raises:
        ValueError: the mask is longer than the actions, or a dimension that is relative is not in the state.
    """
    return actions - _offset(actions, state, mask)


def absolute_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> Shaped[np.ndarray, "... a"]:
    """The inverse of `delta_actions`."""
    return actions + _offset(actions, state, mask)


def _offset(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    relative = np.flatnonzero(mask)
    n = int(relative.max(initial=-1)) + 1  # a state may be narrower than the actions, if what it lacks is absolute
    if len(mask) > actions.shape[-1] or n > state.shape[-1]:
        raise TransformError(
            f"Delta actions: the mask has {len(mask)} dimensions, of which the last that is relative is number {n}, "
            f"actions {actions.shape[-1]} and state {state.shape[-1]}; expected a mask that is no longer than the "
            "actions, and relative dimensions that the state has."
        )
    offset = np.zeros(actions.shape[-1], state.dtype)  # [a]
    offset[relative] = state[relative]
    return offset


def pad_to_dim(x: np.ndarray, dim: int) -> Shaped[np.ndarray, "... d"]:
    """Zeros behind the last axis until it has `dim` entries; what is as wide or wider stays as it is."""
    missing = dim - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing > 0 else x


def unpad(x: np.ndarray, dim: int) -> Shaped[np.ndarray, "... {dim}"]:
    """The first `dim` entries of the last axis.

    Raises:
        ValueError: there are fewer.
    """
    if x.shape[-1] < dim:
        raise TransformError(
            f"Cannot cut an array with {x.shape[-1]} dimensions to {dim}; is the model's action_dim too small?"
        )
    return x[..., :dim]


def bool_mask(*runs: int) -> tuple[bool, ...]:
    """A mask from lengths of runs, negative ones False: bool_mask(6, -1) is six times True, once False."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))
