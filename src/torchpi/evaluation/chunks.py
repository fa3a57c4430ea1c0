"""Sampled frames of a dataset, with the action chunks that a policy predicts there and those that were recorded."""

import bisect
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from torchpi.data import LeRobotDataset, to_observation
from torchpi.data import format as lerobot
from torchpi.data.fit import stats_problems, unit_problems
from torchpi.errors import UsageError, counted
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment

_KEPT = (lerobot.STATE, lerobot.ACTION, "action_is_pad", "episode_index", "frame_index", "task")  # not the images


@dataclasses.dataclass(frozen=True)
class Frame:
    """The frame at which a chunk begins."""

    episode: int
    """The episode's index in the dataset."""
    number: int
    """Within the episode, from 0."""
    task: str
    """The instruction."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """Predicted and recorded chunks of some frames, in the robot's units."""

    embodiment: Embodiment
    frames: tuple[Frame, ...]
    predicted: Float32[np.ndarray, "F R H a"]
    """R: noise samples."""
    recorded: Float32[np.ndarray, "F H a"]
    """Past the end of the episode its last action."""
    is_pad: Bool[np.ndarray, "F H"]
    """Past the end of the episode."""
    state: Float32[np.ndarray, "F s"]
    """In the embodiment's order."""


def open_recorded(policy: Policy, path: str | Path, **reading: Any) -> LeRobotDataset:
    """Open a dataset of the policy's robot, with chunks as long as the policy's.

    Args:
        reading: further arguments of `LeRobotDataset`: episodes, rename, prompt, fps, tolerance_s.

    Warns: about values that seem to have another unit than the robot's, or don't fit the policy's statistics.
    """
    horizon, robot = policy.model.config.require("action_horizon"), policy.embodiment
    dataset = LeRobotDataset(path, action_horizon=horizon, embodiment=robot, columns=(), **reading)
    for problem in unit_problems(dataset, robot) + stats_problems(dataset, robot, policy.transforms):
        warnings.warn(problem, UserWarning, stacklevel=2)
    return dataset


def sample_frames(lengths: Sequence[int], samples: int, *, seed: int = 0) -> list[int]:
    """Sample frames evenly over the episodes, and over the time within each.

    Every episode gets as many as the others, as far as it has them, and is cut into so many parts of equal length, of
    each of which one frame is drawn.

    Args:
        lengths: frames of each episode, as `LeRobotDataset.episode_lengths`; a frame's number counts through them.
        samples: how many; where there are fewer frames, all.
        seed: of the frames, and of the episodes that get one more, or one at all.

    Returns:
        Numbers of frames, each once, in ascending order.

    Raises:
        ValueError: samples isn't positive; there is no frame.
    """
    if samples < 1:
        raise UsageError(f"samples is {samples}; expected 1 or more.")
    if not sum(lengths):
        empty = counted(len(lengths), "episode is", "episodes are")
        raise UsageError(f"There is no frame to judge: the {empty} empty.")
    samples, sizes = min(samples, sum(lengths)), np.array(lengths)
    # As many of every episode as it has, up to a common limit; one more of some of the longer ones, at random.
    limit = bisect.bisect_right(range(max(lengths) + 1), samples, key=lambda most: np.minimum(sizes, most).sum()) - 1
    shares = np.minimum(sizes, limit)
    longer = generator_at(seed, "evaluated episodes").permutation(np.flatnonzero(sizes > limit))
    shares[longer[: samples - shares.sum()]] += 1
    frames, first = [], 0
    for episode, (length, share) in enumerate(zip(lengths, shares, strict=True)):
        edges, rng = np.linspace(0, length, share + 1).astype(np.int64), generator_at(seed, "evaluated frames", episode)
        frames += (first + rng.integers(edges[:-1], edges[1:])).tolist()
        first += length
    return frames


def sample_new_images(dataset: LeRobotDataset, samples: int, *, seed: int = 0) -> list[int]:
    """As `sample_frames`, of the frames of a dataset that have images of their own."""
    ends = np.searchsorted(dataset.new_images, [rows.stop for rows in dataset.episode_rows])
    return dataset.new_images[sample_frames(np.diff(ends, prepend=0).tolist(), samples, seed=seed)].tolist()


def predict_chunks(
    policy: Policy,
    dataset: LeRobotDataset,
    frames: Sequence[int],
    *,
    seed: int = 0,
    num_steps: int | None = None,
    batch_size: int = 32,
    noise_samples: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> Chunks:
    """Predict the chunks at frames of a dataset of the policy's robot; the policy stays as it is.

    Args:
        dataset: with chunks as long as the policy's.
        frames: numbers of frames, see `sample_frames`.
        seed: a chunk's noise depends on it, on the frame's place in its episode and on the number of the noise sample.
        batch_size: chunks at once; all noise samples of a frame are in one batch.
        noise_samples: chunks per frame.
        on_batch: called after each batch with its number of frames, for a progress bar.

    Raises:
        KeyError: the dataset has no such camera.
        IndexError: it has no such frame.
        ValueError: it is of another robot, or its chunks are of another length; the policy's action_horizon is not set;
            no frames, or a count that isn't positive.
    """
    horizon = policy.model.config.require("action_horizon")
    if dataset.action_horizon != horizon:
        raise UsageError(
            f"The policy predicts {counted(horizon, 'action')}, but the dataset {dataset.path} was opened for chunks "
            f"of {dataset.action_horizon}. Open it with action_horizon={horizon}."
        )
    for name, count in (("frames", len(frames)), ("batch_size", batch_size), ("noise_samples", noise_samples)):
        if count < 1:
            raise UsageError(f"{name}: got {count}; expected 1 or more.")
    kept: list[dict[str, Any]] = []
    predicted: list[np.ndarray] = []
    size = max(1, batch_size // noise_samples)
    for start in range(0, len(frames), size):
        items = [dataset[frame] for frame in frames[start : start + size]]
        chunks = policy.infer_batch(
            [_observation(item, policy.embodiment) for item in items for _ in range(noise_samples)],
            noise=np.stack([_noise(policy, seed, _frame(item), i) for item in items for i in range(noise_samples)]),
            num_steps=num_steps,
        )
        predicted += [chunk["actions"] for chunk in chunks]
        kept += [{key: item[key] for key in _KEPT} for item in items]
        if on_batch is not None:
            on_batch(len(items))
    return Chunks(
        policy.embodiment,
        tuple(map(_frame, kept)),
        np.stack(predicted).reshape(len(kept), noise_samples, horizon, policy.embodiment.action_size),
        np.stack([item[lerobot.ACTION] for item in kept]),
        np.stack([item["action_is_pad"] for item in kept]),
        np.stack([item[lerobot.STATE] for item in kept]),
    )


def _frame(item: Mapping[str, Any]) -> Frame:
    # Not the frame's number in the dataset as it was opened, which depends on the episodes that were chosen.
    return Frame(int(item["episode_index"]), int(item["frame_index"]), item["task"])


def _observation(item: Mapping[str, Any], embodiment: Embodiment) -> dict[str, Any]:
    observation = to_observation(item, embodiment)
    del observation["actions"]  # the recorded ones
    return observation


def _noise(policy: Policy, seed: int, frame: Frame, sample: int) -> Float32[np.ndarray, "H A"]:
    generator = generator_at(seed, "evaluation", frame.episode, frame.number, sample)
    return generator.standard_normal(policy.model.config.chunk_shape, np.float32)
