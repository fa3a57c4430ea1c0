"""Several sampled chunks per observation: choose the one to execute, and measure their spread."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float32

from torchpi.config import Pi0Config
from torchpi.errors import PolicyError, is_whole
from torchpi.transforms.normalize import DEVIATIONS

PickName = Literal["consensus", "velocity_residual", "first"]
Pick = PickName | Callable[[np.ndarray, Mapping[str, Any]], int]
"""A rule, or a function of the samples [R, H, a] (in the robot's units) and the observation that returns an index.

consensus: the medoid, the sample with the smallest mean distance to the others.
velocity_residual: the sample with the straightest path from noise to actions, where Euler steps are most accurate.
first: the sample that a single inference with the same noise returns.
"""
SAMPLE_FIELDS = ("samples", "sample_index", "velocity_residuals", "action_std", "uncertainty")
"""Fields of `ActionChunk` that describe several samples."""
_NORMALIZED_RANGE = {"quantile": 2.0, "z_score": 2 * DEVIATIONS}
"""Width of q01 to q99 in normalized units; unknown for "identity", where the actions' own units are used."""


def finite_noise(
    noise: Any, config: Pi0Config, num_samples: Any, batch: tuple[int, ...] = ()
) -> Float32[np.ndarray, "..."]:
    """Check the noise argument, [*batch, H, A] or with num_samples [*batch, R, H, A], and convert it to float32."""
    array = np.asarray(noise)
    found = f"got {array.dtype} {list(array.shape)}"
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise PolicyError(f"Noise must be floating-point numbers, {found}; at most 64 bits are read.")
    if num_samples == 1 and array.ndim == len(batch) + 2:
        array = np.expand_dims(array, -3)
    # The noise sets the horizon if the config does not.
    horizon = config.action_horizon or (array.shape[-2] if array.ndim > 1 else "H")
    expected = (*batch, *(() if num_samples is None else (num_samples,)), horizon, config.action_dim)
    if array.shape != expected or not array.size:
        raise PolicyError(f"Noise must be [{', '.join(map(str, expected))}], {found}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise PolicyError("The noise contains NaN or infinity; it must be finite in float32.")
    return array


def checked_pick(pick: Any, num_samples: Any, num_steps: Any) -> Pick | None:
    """Check `num_samples` and `pick`; return the pick, by default "consensus", or None for a single sample."""
    if num_samples is not None and not (is_whole(num_samples) and num_samples >= 1):
        raise PolicyError(f"num_samples is {num_samples!r:.80}; expected a positive whole number.")
    if num_samples is None and pick is not None:
        raise PolicyError("pick chooses among several samples: pass num_samples= as well, or leave pick out.")
    if pick is not None and not callable(pick) and pick not in get_args(PickName):
        names = ", ".join(get_args(PickName))
        raise PolicyError(f"pick is {pick!r:.80}; expected one of {names}, or a function of samples and observation.")
    if pick == "velocity_residual" and num_steps == 1:
        raise PolicyError("pick is velocity_residual, but with one Euler step every path is straight: use two or more.")
    return None if num_samples is None else pick or "consensus"


def choose(
    pick: Pick,
    samples: Float[np.ndarray, "R H a"],
    normalized: Float[np.ndarray, "R H dims"],
    residual: Float[np.ndarray, "R H dims"] | None,
    *,
    kind: str,
    observation: Mapping[str, Any],
) -> dict[str, Any]:
    """Choose a sample and compute the `SAMPLE_FIELDS` of the `ActionChunk`.

    Args:
        samples: in the robot's units.
        normalized: the model's outputs, without padding and untrained dimensions.
        residual: residuals of the same dimensions, see `model.rtc.Samples`.
        kind: normalization kind of the actions.
    """
    residuals = None if residual is None else np.sqrt(residual.mean(axis=(1, 2)))
    index: Any = 0  # for "first" and for a single sample
    if callable(pick):
        index = pick(samples.copy(), observation)
        if not is_whole(index) or not 0 <= index < len(samples):
            raise PolicyError(f"pick returned {index!r:.80}; expected an index from 0 to {len(samples) - 1}.")
    elif pick == "velocity_residual" and residuals is not None:
        index = residuals.argmin()
    elif pick == "consensus":
        flat = normalized.reshape(len(samples), -1).astype(np.float64)
        index = np.linalg.norm(flat[:, None] - flat, axis=-1).sum(axis=1).argmin()
    fields = {"samples": samples, "sample_index": int(index)}
    if residuals is None:
        return fields
    spread = normalized.std(axis=0, ddof=1, dtype=np.float64)
    return fields | {
        "velocity_residuals": residuals,
        "action_std": samples.std(axis=0, ddof=1, dtype=np.float64).astype(np.float32),
        "uncertainty": float(spread.mean()) / _NORMALIZED_RANGE.get(kind, 1.0),
    }
