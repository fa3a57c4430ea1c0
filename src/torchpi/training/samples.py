"""From a dataset to batches: what is drawn for a sample is drawn from its place in the run, (seed, step, position)."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchpi.collate import stack_inputs
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.observations import to_observation
from torchpi.errors import TrainingError
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment
from torchpi.sim.processes import interrupts_held
from torchpi.training.augment import OFF, Augmentation, augment, draw
from torchpi.transforms.pipeline import Transforms
from torchpi.types import Observation


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is drawn for each sample."""

    seed: int
    flow_samples_per_obs: int
    """R: draws of noise and time."""
    state_noise: float = 0.0
    """Standard deviation, in the units of the normalized state."""
    augmentation: Augmentation | None = None
    """Of the images."""
    max_action_prefix: int = 0
    """At most so many first actions are given without noise."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one pass is computed from."""

    observation: Observation
    actions: Float32[Tensor, "B H A"]
    """Normalized and padded to action_dim."""
    is_real: Bool[Tensor, "B H A"]
    """False at padded dimensions, and at steps past the end of the episode."""
    noise: Float32[Tensor, "B R H A"]
    time: Float32[Tensor, "B R"]
    places: tuple["Place", ...]
    """Where the samples come from."""
    num_given: Int[Tensor, "B R"] | None = None
    """How many first actions are given without noise, see `Pi0.forward`."""

    def terms(self, which: str) -> Bool[Tensor, "B R H A"]:
        """The numbers that the loss is the mean of, see `TrainConfig.loss`; never what is given."""
        counts = torch.ones_like(self.is_real) if which == "all" else self.is_real
        if self.num_given is None:
            return counts[:, None].expand(self.noise.shape)
        step = torch.arange(counts.shape[1], device=counts.device)
        return counts[:, None] & (step >= self.num_given[:, :, None])[..., None]

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, to be looked at."""
        observation = self.observation
        named = {f"image.{name}": image for name, image in observation.images.items()}
        named |= {f"image_mask.{name}": mask for name, mask in observation.image_masks.items()}
        for name in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
            named[name] = getattr(observation, name)
        for name in ("actions", "is_real", "noise", "time"):
            named[name] = getattr(self, name)
        return {**named, "places": torch.tensor(self.places)}


def loss_sum(forward: Any, batch: Batch, terms: str) -> torch.Tensor:
    """The sum of the loss' terms over a batch: all of them, or the "real" ones, see `TrainConfig.loss`."""
    mask = None if terms == "all" and batch.num_given is None else batch.terms(terms)
    loss = forward(
        batch.observation,
        batch.actions,
        noise=batch.noise,
        time=batch.time,
        prefix_len=batch.num_given,
        loss_mask=mask,
    )  # [B, R, H]
    return loss.sum() * batch.actions.shape[-1]  # it is the mean over the action dimensions


def num_terms(batch: Batch, terms: str) -> int:
    """How many terms `loss_sum` adds up."""
    if terms == "all" and batch.num_given is None:
        return batch.noise.numel()
    return int(batch.terms(terms).sum())


Place = tuple[int, int, int, int]
"""(dataset of the mixture, frame, step, position in the batch)"""


@dataclasses.dataclass(frozen=True)
class Frames:
    """A dataset, and how its frames become the model's inputs."""

    dataset: LeRobotDataset
    embodiment: Embodiment
    transforms: Transforms
    prompt: str | None = None
    """Instead of the frames' tasks."""


class Samples(Dataset):
    """The samples of a run by their places in it: the part of the work that other processes can do."""

    def __init__(self, sources: Sequence[Frames], draws: Draws) -> None:
        self.sources, self.draws = sources, draws
        # A robot without one of the others' cameras has a black one in its place, which is masked.
        self.cameras = tuple(dict.fromkeys(name for source in sources for name in source.embodiment.camera_names))

    def __getitem__(self, place: Place) -> dict[str, Any]:
        """The model's inputs of one sample, its actions, and its noise, time and augmentation."""
        number, frame, step, position = place
        source = self.sources[number]
        rng = generator_at(self.draws.seed, "sample", step, position)
        item = source.dataset[frame]
        if source.prompt is not None:
            item["task"] = source.prompt
        sample = source.embodiment.to_model(to_observation(item, source.embodiment))
        state_noise = rng.standard_normal(len(sample["state"])) * self.draws.state_noise
        inputs = source.transforms.forward(sample, state_noise=state_noise)
        real = inputs["tokenized_prompt_mask"]  # padding costs time and changes nothing
        is_real = np.zeros(inputs["actions"].shape, np.bool_)
        is_real[~item["action_is_pad"], : source.embodiment.action_size] = True
        return {
            **self._with_all_cameras(inputs),
            "tokenized_prompt": inputs["tokenized_prompt"][real],
            "tokenized_prompt_mask": real[real],
            "is_real": is_real,
            "noise": rng.standard_normal((self.draws.flow_samples_per_obs, *inputs["actions"].shape), np.float32),
            # Beta(1.5, 1)·0.999 + 0.001, as `flow.sample_time`.
            "time": rng.random(self.draws.flow_samples_per_obs) ** (1 / 1.5) * 0.999 + 0.001,
            "augmentation": self._draw_augmentation(rng, inputs["image"]),
            "num_given": rng.integers(0, self.draws.max_action_prefix, self.draws.flow_samples_per_obs, endpoint=True),
            "place": place,
        }

    def _with_all_cameras(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        images, masks = inputs["image"], inputs["image_mask"]
        black = np.zeros_like(next(iter(images.values())))
        return {
            **inputs,
            "image": {name: images.get(name, black) for name in self.cameras},
            "image_mask": {name: masks.get(name, np.bool_(False)) for name in self.cameras},
        }

    def _draw_augmentation(self, rng: np.random.Generator, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.draws.augmentation
        if config is None:
            return {}
        size = next(iter(images.values())).shape[0]
        drawn = {name: draw(config, rng, size) for name in images}
        first = next(iter(drawn.values()))
        return {name: first if config.like_openpi else drawn.get(name, OFF) for name in self.cameras}

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack samples; images stay uint8, a quarter of the bytes to move."""

        def stacked(values: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(values).astype(np.float32))

        numbers = {key: stacked([sample[key] for sample in samples]) for key in ("actions", "noise", "time")}
        drawn = samples[0]["augmentation"]
        augmentation = {name: stacked([sample["augmentation"][name] for sample in samples]) for name in drawn}
        is_real = torch.from_numpy(np.stack([sample["is_real"] for sample in samples]))
        return {
            "inputs": stack_inputs(samples),
            **numbers,
            "is_real": is_real,
            "augmentation": augmentation,
            "num_given": torch.from_numpy(np.stack([sample["num_given"] for sample in samples])),
            "places": tuple(sample["place"] for sample in samples),
        }

    def finish(self, stacked: Mapping[str, Any], device: str | torch.device) -> Batch:
        """The batch of what `collate` returned, on the device, its images augmented there."""
        observation = Observation.from_dict(_to(stacked["inputs"], device))
        if self.draws.augmentation is not None:
            observation = augment(observation, self.draws.augmentation, stacked["augmentation"])
        numbers = {key: stacked[key].to(device) for key in ("actions", "is_real", "noise", "time")}
        num_given = stacked["num_given"].to(device) if self.draws.max_action_prefix else None
        return Batch(observation, **numbers, places=stacked["places"], num_given=num_given)

    def batches(self, places: Iterable[list[Place]], workers: int) -> Iterator[dict[str, Any]]:
        """Collated batches of the places, in their order, prepared ahead by worker processes."""
        loader = DataLoader(
            _Batches(self),
            batch_sampler=places,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=4 if workers else None,
            # Not forked: threads of pyarrow and torch would be missing in the child, and their locks held.
            multiprocessing_context="spawn" if workers else None,
        )
        with interrupts_held():  # Ctrl-C is for the loop, which stops after its update; without workers it could not
            return _raise_errors(iter(loader))


class _Batches(Dataset):
    """Collated samples. A user's mistake is a value: raised in a worker process, it would arrive with that process'
    traceback as its message."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, places: list[Place]) -> dict[str, Any] | Exception:
        try:
            return self.samples.collate([self.samples[place] for place in places])
        except (FileNotFoundError, KeyError, ValueError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _raise_errors(batches: Iterator[dict[str, Any] | Exception]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _to(tree: Any, device: str | torch.device) -> Any:
    return {key: _to(value, device) for key, value in tree.items()} if isinstance(tree, dict) else tree.to(device)


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """The places of a process' passes, in their order.

    Of each dataset all frames come in random order, then all in another one, and so on. The datasets are mixed in
    blocks, in each of which their samples are as many as their weights say, in random order. So the place of any sample
    follows from its number alone: a run that is resumed has to know the step only.
    """

    frames: Sequence[Int[np.ndarray, " _"]]
    """Of each dataset, the numbers of the frames that are trained on."""
    weights: Sequence[float]
    """Of each dataset."""
    batch_size: int
    """Over all processes and passes."""
    grad_accum_steps: int
    """Passes per update."""
    seed: int
    first_step: int
    last_step: int
    """Not included."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.grad_accum_steps
        if self.batch_size % parts:
            raise TrainingError(
                f"batch_size {self.batch_size} can't be divided by {self.world_size} processes × "
                f"{self.grad_accum_steps} micro-batches; choose a multiple of {parts}."
            )

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[Place]]:
        size = self.batch_size // (self.world_size * self.grad_accum_steps)
        sources = _Mixture(self.weights, self.seed)
        orders = [_Shuffled(frames, self.seed, number) for number, frames in enumerate(self.frames)]
        for step in range(self.first_step, self.last_step):
            for turn in range(self.grad_accum_steps):
                start = (turn * self.world_size + self.rank) * size
                places = []
                for position in range(start, start + size):
                    source, count = sources.at(step * self.batch_size + position)
                    places.append((source, orders[source].at(count), step, position))
                yield places


class _Mixture:
    """Which dataset each sample of a run is from."""

    BLOCK = 1 << 16

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.ends, self.seed, self.block = np.cumsum(weights) / np.sum(weights), seed, -1
        if min(weights) / sum(weights) * self.BLOCK < 2:
            raise TrainingError(f"A dataset with the weight {min(weights)} of {sum(weights)} would hardly be seen.")

    def at(self, number: int) -> tuple[int, int]:
        """The dataset of a sample, and how many samples before it are from the same one."""
        block, place = divmod(number, self.BLOCK)
        if block != self.block:
            self._enter(block)
        return int(self.sources[place]), int(self.counts[place])

    def _enter(self, block: int) -> None:
        self.block, before = block, self._seen_before(block)
        in_order = np.repeat(np.arange(len(self.ends)), self._seen_before(block + 1) - before)
        self.sources = generator_at(self.seed, "mixture", block).permutation(in_order)
        self.counts = np.empty_like(self.sources)
        for source, start in enumerate(before):
            mine = self.sources == source
            self.counts[mine] = start + np.arange(mine.sum())

    def _seen_before(self, block: int) -> Int[np.ndarray, " sources"]:
        """Samples of each dataset in the blocks before."""
        return np.diff(np.rint(self.ends * block * self.BLOCK).astype(np.int64), prepend=0)


class _Shuffled:
    """The frames of a dataset, epoch by epoch."""

    def __init__(self, frames: Int[np.ndarray, " F"], seed: int, number: int) -> None:
        self.frames, self.seed, self.number, self.epoch = frames, seed, number, -1

    def at(self, count: int) -> int:
        """The frame of the sample before which there were `count`."""
        epoch, place = divmod(count, len(self.frames))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = generator_at(self.seed, "order", self.number, epoch).permutation(self.frames)
        return int(self.order[place])
