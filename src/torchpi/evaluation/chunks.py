"""Which frames are judged, and the chunks that a policy predicts at them, beside the recorded ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from torchpi.data import LeRobotDataset, to_observation
from torchpi.data import format as lerobot
from torchpi.errors import UsageError
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a chunk begins."""

    episode: int
    """The episode's index in the data set."""
    number: int
    """Within the episode, from 0."""
    task: str
    """The instruction."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """What a policy predicts at some frames, and what was recorded there, in the robot's units."""

    embodiment: Embodiment
    frames: tuple[Frame, ...]
    predicted: Float32[np.ndarray, "F R H a"]
    """R: draws of noise."""
    recorded: Float32[np.ndarray, "F H a"]
    """Past the end of the episode its last action."""
    is_pad: Bool[np.ndarray, "F H"]
    """Past the end of the episode."""
    state: Float32[np.ndarray, "F s"]
    """In the embodiment's order."""


def sample_frames(lengths: Sequence[int], samples: int, *, seed: int = 0) -> list[int]:
    """Frames that are spread evenly over episodes, and over the time within each.

    Every episode gets as many as the others, as far as it has them, and is cut into so many parts of equal length, of
    each of which one frame is drawn.

    Args:
        lengths: frames of each episode, as `LeRobotDataset.episode_lengths`; a frame's number counts through them.
        samples: how many; where there are fewer frames, all.
        seed: of the draws, and of the episodes that get one more, or one at all.

    Returns:
        Numbers of frames, each once, in ascending order.

    Raises:
        ValueError: samples isn't positive; there is no frame.
    """
    if samples < 1:
        raise UsageError(f"samples is {samples}; expected 1 or more.")
    if not sum(lengths):
        raise UsageError(f"There is no frame to judge: the {len(lengths)} episodes are empty.")
    frames, first = [], 0
    for episode, (length, count) in enumerate(zip(lengths, _shares(lengths, samples, seed), strict=True)):
        edges = np.linspace(0, length, count + 1).astype(np.int64)
        rng = generator_at(seed, "evaluated frames", episode)
        frames += (first + rng.integers(edges[:-1], edges[1:])).tolist()
        first += length
    return frames


def _shares(lengths: Sequence[int], samples: int, seed: int) -> list[int]:
    """How many frames of each: in rounds, one of every episode that has more; the last round in random order."""
    shares = [0] * len(lengths)
    left = min(samples, sum(lengths))
    while left:
        longer = [i for i, length in enumerate(lengths) if length > shares[i]]
        if left < len(longer):
            longer = generator_at(seed, "evaluated episodes").permutation(longer)[:left].tolist()
        rounds = max(1, min(left // len(longer), min(lengths[i] - shares[i] for i in longer)))
        for i in longer:
            shares[i] += rounds
        left -= rounds * len(longer)
    return shares


def predict_chunks(
    policy: Policy,
    dataset: LeRobotDataset,
    frames: Sequence[int],
    *,
    seed: int = 0,
    num_steps: int = 10,
    batch_size: int = 32,
    draws: int = 1,
    prompt: str | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Chunks:
    """The chunks that a policy predicts at frames of a data set of its robot; the policy stays as it is.

    Args:
        dataset: with chunks as long as the policy's.
        frames: numbers of the data set's frames, as `sample_frames` gives them.
        seed: a chunk's noise depends on it, the frame's place in its episode, and the draw; on nothing else.
        num_steps: Euler steps.
        batch_size: chunks at once; all draws of a frame are in one batch.
        draws: of noise, per frame.
        prompt: the instruction of all frames, instead of their tasks.
        on_batch: called after each batch, for a progress bar.

    Raises:
        KeyError: the data set has no such camera.
        IndexError: it has no such frame.
        ValueError: it is of another robot, or its chunks are of another length; the policy's action_horizon is not set;
            no frames, or a count that isn't positive.
    """
    horizon = policy.model.config.require("action_horizon")
    if dataset.action_horizon != horizon:
        raise UsageError(
            f"The policy predicts {horizon} actions, but the data set {dataset.path} was opened for chunks of "
            f"{dataset.action_horizon}. Open it with action_horizon={horizon}."
        )
    for name, count in (("frames", len(frames)), ("batch_size", batch_size), ("draws", draws)):
        if count < 1:
            raise UsageError(f"{name}: got {count}; expected 1 or more.")
    places: list[Frame] = []
    items: list[dict[str, Any]] = []
    predicted: list[np.ndarray] = []
    for batch in batches(frames, batch_size=batch_size, draws=draws):
        batch_items = [dataset[frame] for frame in batch]
        batch_places = [_place(item) for item in batch_items]
        chunks = policy.infer_batch(
            [_observation(item, policy.embodiment, prompt) for item in batch_items for _ in range(draws)],
            noise=np.stack([_noise(policy, seed, place, draw) for place in batch_places for draw in range(draws)]),
            num_steps=num_steps,
        )
        predicted += [chunk["actions"] for chunk in chunks]
        places += batch_places
        # The images are not kept.
        items += [{key: item[key] for key in (lerobot.STATE, lerobot.ACTION, "action_is_pad")} for item in batch_items]
        if on_batch is not None:
            on_batch()
    stacked = {key: np.stack([item[key] for item in items]) for key in items[0]}
    return Chunks(
        policy.embodiment,
        tuple(places),
        np.stack(predicted).reshape(len(places), draws, horizon, policy.embodiment.action_size),
        stacked[lerobot.ACTION],
        stacked["action_is_pad"],
        stacked[lerobot.STATE],
    )


def batches(frames: Sequence[int], *, batch_size: int, draws: int) -> list[Sequence[int]]:
    """The frames of each batch of `predict_chunks`."""
    size = max(1, batch_size // draws)
    return [frames[at : at + size] for at in range(0, len(frames), size)]


def _place(item: Mapping[str, Any]) -> Frame:
    # Not the frame's number in what is read, which depends on the episodes that were chosen.
    return Frame(int(item["episode_index"]), int(item["frame_index"]), item["task"])


def _observation(item: Mapping[str, Any], embodiment: Embodiment, prompt: str | None) -> dict[str, Any]:
    observation = to_observation(item if prompt is None else {**item, "task": prompt}, embodiment)
    del observation["actions"]  # what is to be predicted
    return observation


def _noise(policy: Policy, seed: int, frame: Frame, draw: int) -> Float32[np.ndarray, "H A"]:
    shape = (policy.model.config.require("action_horizon"), policy.model.config.action_dim)
    return generator_at(seed, "evaluation", frame.episode, frame.number, draw).standard_normal(shape, np.float32)
