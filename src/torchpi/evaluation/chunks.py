"""Action chunks that a policy predicts at sampled frames of a dataset, and the recorded ones."""

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

# The columns that `Chunks` needs; images are not kept in memory.
_COLUMNS = (lerobot.STATE, lerobot.ACTION, "action_is_pad", "episode_index", "frame_index", "task")


@dataclasses.dataclass(frozen=True)
class Frame:
    """The frame at which a chunk begins."""

    episode: int
    """Index of the episode in the dataset."""
    number: int
    """Index of the frame in the episode."""
    task: str
    """The instruction."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """Predicted and recorded chunks at some frames, in the robot's units."""

    embodiment: Embodiment
    frames: tuple[Frame, ...]
    predicted: Float32[np.ndarray, "F R H a"]
    """R: noise samples."""
    recorded: Float32[np.ndarray, "F H a"]
    """The episode's last action is repeated past its end."""
    is_pad: Bool[np.ndarray, "F H"]
    """True past the end of the episode."""
    state: Float32[np.ndarray, "F s"]
    """In the embodiment's order."""


def open_recorded(policy: Policy, path: str | Path, **reading: Any) -> LeRobotDataset:
    """Open a dataset of the policy's robot, with chunks of the policy's length.

    Args:
        reading: further arguments of `LeRobotDataset`: episodes, rename, prompt, fps, tolerance_s.

    Warns: if values seem to be in another unit than the robot's, or do not fit the policy's statistics.
    """
    horizon, robot = policy.model.config.require("action_horizon"), policy.embodiment
    dataset = LeRobotDataset(path, action_horizon=horizon, embodiment=robot, columns=(), **reading)
    for problem in unit_problems(dataset, robot) + stats_problems(dataset, robot, policy.transforms):
        warnings.warn(problem, UserWarning, stacklevel=2)
    return dataset


def sample_frames(lengths: Sequence[int], samples: int, *, seed: int = 0) -> list[int]:
    """Sample frames evenly over the episodes, and over the time within each.

    Every episode gets the same number of samples, or all of its frames if it has fewer. It is divided into as many
    parts of equal length, and one frame is drawn from each.

    Args:
        lengths: number of frames of each episode, as `LeRobotDataset.episode_lengths`.
        samples: number of samples; all frames if there are fewer.
        seed: seed of the frames, and of the episodes that get the remaining samples.

    Returns:
        Distinct frame indices, counted through all episodes, in ascending order.

    Raises:
        ValueError: samples is not positive, or there is no frame.
    """
    if samples < 1:
        raise UsageError(f"samples is {samples}; expected 1 or more.")
    if not sum(lengths):
        empty = counted(len(lengths), "episode is", "episodes are")
        raise UsageError(f"There are no frames to sample: the {empty} empty.")
    samples, sizes = min(samples, sum(lengths)), np.array(lengths)
    # Every episode gets up to `limit` samples, and randomly chosen longer ones get one more.
    limit = bisect.bisect_right(range(max(lengths) + 1), samples, key=lambda n: np.minimum(sizes, n).sum()) - 1
    shares = np.minimum(sizes, limit)
    longer = generator_at(seed, "evaluated episodes").permutation(np.flatnonzero(sizes > limit))
    shares[longer[: samples - shares.sum()]] += 1
    frames, start = [], 0
    for episode, (length, share) in enumerate(zip(lengths, shares, strict=True)):
        edges, rng = np.linspace(0, length, share + 1).astype(np.int64), generator_at(seed, "evaluated frames", episode)
        frames += (start + rng.integers(edges[:-1], edges[1:])).tolist()
        start += length
    return frames


def sample_new_images(dataset: LeRobotDataset, samples: int, *, seed: int = 0) -> list[int]:
    """Sample frames as `sample_frames` does, from those with new images (not repeated from the frame before)."""
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
    """Predict the chunks at frames of a dataset of the policy's robot, without changing the policy.

    Args:
        dataset: opened with chunks of the policy's length.
        frames: frame indices, see `sample_frames`.
        seed: seed of the noise, which also depends on episode, frame index in it, and noise sample.
        num_steps: Euler steps; None: the policy's default.
        batch_size: chunks per batch; all noise samples of a frame are in one batch.
        noise_samples: chunks per frame.
        on_batch: called after each batch with its number of frames, for a progress bar.

    Raises:
        KeyError: the dataset lacks a camera of the robot.
        IndexError: there is no such frame.
        ValueError: the dataset is of another robot, or was opened with chunks of another length; the policy's
            action_horizon is not set; there are no frames, or a count is not positive.
    """
    horizon, robot = policy.model.config.require("action_horizon"), policy.embodiment
    if dataset.action_horizon != horizon:
        raise UsageError(
            f"The policy predicts {counted(horizon, 'action')}, but the dataset {dataset.path} was opened for chunks "
            f"of {dataset.action_horizon}. Open it with action_horizon={horizon}."
        )
    for name, count in (("frames", len(frames)), ("batch_size", batch_size), ("noise_samples", noise_samples)):
        if count < 1:
            raise UsageError(f"{name}: got {count}; expected 1 or more.")
    predicted, columns = list[np.ndarray](), list[dict[str, Any]]()
    size = max(1, batch_size // noise_samples)
    for start in range(0, len(frames), size):
        items = [dataset[frame] for frame in frames[start : start + size]]
        chunks = policy.infer_batch(
            [_observation(item, robot) for item in items for _ in range(noise_samples)],
            noise=np.stack([_noise(policy, seed, _frame(item), i) for item in items for i in range(noise_samples)]),
            num_steps=num_steps,
        )
        predicted += [chunk["actions"] for chunk in chunks]
        columns += [{key: item[key] for key in _COLUMNS} for item in items]
        if on_batch is not None:
            on_batch(len(items))
    return Chunks(
        robot,
        tuple(map(_frame, columns)),
        np.stack(predicted).reshape(len(frames), noise_samples, horizon, robot.action_size),
        np.stack([item[lerobot.ACTION] for item in columns]),
        np.stack([item["action_is_pad"] for item in columns]),
        np.stack([item[lerobot.STATE] for item in columns]),
    )


def _frame(item: Mapping[str, Any]) -> Frame:
    # The index in the opened dataset would depend on the chosen episodes.
    return Frame(int(item["episode_index"]), int(item["frame_index"]), item["task"])


def _observation(item: Mapping[str, Any], embodiment: Embodiment) -> dict[str, Any]:
    observation = to_observation(item, embodiment)
    del observation["actions"]  # the recorded ones
    return observation


def _noise(policy: Policy, seed: int, frame: Frame, sample: int) -> Float32[np.ndarray, "H A"]:
    generator = generator_at(seed, "evaluation", frame.episode, frame.number, sample)
    return generator.standard_normal(policy.model.config.chunk_shape, np.float32)
