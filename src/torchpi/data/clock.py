"""Check of a dataset's timestamps against its frame rate."""

from collections.abc import Sequence

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.metadata import Episode
from torchpi.errors import DatasetError

_UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}


def check_tolerance(tolerance_s: float | int | None, fps: float | int) -> float:
    """Check a tolerance in seconds; a quarter of a frame by default."""
    if tolerance_s is not None and not 0 < tolerance_s < np.inf:
        raise DatasetError(f"tolerance_s is {tolerance_s}; expected a positive number of seconds (--tolerance-s).")
    return 0.25 / fps if tolerance_s is None else float(tolerance_s)


def check_clock(timestamps: np.ndarray, episodes: Sequence[Episode], *, fps: float | int, tolerance_s: float) -> None:
    """Refuse timestamps [F] at another rate than fps, at which the actions of a chunk would be too fast or too slow.
    The clock of each episode may start at any time."""
    clock = timestamps.reshape(-1)
    lengths = np.array([episode.length for episode in episodes])
    firsts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # [F]
    seconds = clock.astype(np.float64) - clock[firsts]
    expected = (np.arange(len(clock)) - firsts) / fps
    # Far from 0, float32 is too coarse to separate frames: Unix times are 128 s apart.
    resolution = np.spacing(np.abs(clock)) if clock.dtype.kind == "f" else np.zeros_like(seconds)
    wrong = np.flatnonzero(~(np.abs(seconds - expected) <= tolerance_s + resolution) | (resolution > 0.5 / fps))
    if not wrong.size:
        return
    i = int(wrong[0])
    episode = episodes[int(np.searchsorted(np.cumsum(lengths), i, side="right"))]
    total = seconds[firsts[i] + episode.length - 1]
    rate = (episode.length - 1) / total if total else np.inf
    units = [name for name, factor in _UNITS.items() if abs(rate * factor / fps - 1) < 0.1]
    if units:
        cause = f"The timestamps seem to be in {units[0]}; write them in seconds."
    elif resolution[i] > 0.5 / fps:
        cause = (
            f"The clock of episode {episode.index} starts at {clock[firsts[i]]:.0f} s, where {clock.dtype} has a "
            f"resolution of only {resolution[i]:.3g} s; write it as float64, or let each episode start at 0."
        )
    else:
        cause = (
            f"The whole episode has {rate:.4g}. If that is its true rate, correct fps there; if its clock is uneven, "
            f"allow more with tolerance_s=; if frames are missing, {lerobot.LEAVE_OUT}."
        )
    count = len(np.unique(np.searchsorted(np.cumsum(lengths), wrong, side="right")))
    if count > 1:
        cause += f" {count} of {len(episodes)} episodes are affected."
    raise DatasetError(
        f"{episode.data_file}: frame {i - firsts[i]} of episode {episode.index} was taken {seconds[i]:.4f} s after the "
        f"first one; expected {expected[i]:.4f} s ± {tolerance_s:.4f} s, because {lerobot.INFO} states {fps:g} frames "
        f"per second. {cause}"
    )
