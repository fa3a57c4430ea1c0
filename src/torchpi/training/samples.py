"""From a dataset to batches: what is drawn for a sample is drawn from its place in the run, (seed, step, position)."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.observations import to_observation
from torchpi.policy import stack_inputs
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment
from torchpi.sim.workers import interrupts_held
from torchpi.training.augment import Augmentation, augment, draw
from torchpi.transforms.pipeline import Transforms
from torchpi.types import Observation


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is drawn for each sample."""

    seed: int
    num_draws: int
    """R: draws of noise and time."""
    state_noise: float = 0.0
    """Standard deviation, in the units of the normalized state."""
    augmentation: Augmentation | None = None
    """Of the images."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one update is computed from."""

    observation: Observation
    actions: Float32[Tensor, "B H A"]
    """Normalized and padded to action_dim."""
    noise: Float32[Tensor, "B R H A"]
    time: Float32[Tensor, "B R"]


Place = tuple[int, int, int]
"""(frame, step, position in the batch)"""


class Samples(Dataset):
    """The samples of a run by their places in it: the part of the work that other processes can do."""

    def __init__(self, dataset: LeRobotDataset, embodiment: Embodiment, transforms: Transforms, draws: Draws) -> None:
        self.dataset, self.embodiment, self.transforms, self.draws = dataset, embodiment, transforms, draws

    def __getitem__(self, place: Place) -> dict[str, Any]:
        """The model's inputs of one sample, its actions, and its noise, time and augmentation."""
        frame, step, position = place
        rng = generator_at(self.draws.seed, "sample", step, position)
        sample = self.embodiment.to_model(to_observation(self.dataset[frame], self.embodiment))
        state_noise = rng.standard_normal(len(sample["state"])) * self.draws.state_noise
        inputs = self.transforms.forward(sample, state_noise=state_noise)
        real = inputs["tokenized_prompt_mask"]  # padding costs time and changes nothing
        return {
            **inputs,
            "tokenized_prompt": inputs["tokenized_prompt"][real],
            "tokenized_prompt_mask": real[real],
            "noise": rng.standard_normal((self.draws.num_draws, *inputs["actions"].shape), np.float32),
            # Beta(1.5, 1)·0.999 + 0.001, as `flow.sample_time`.
            "time": rng.random(self.draws.num_draws) ** (1 / 1.5) * 0.999 + 0.001,
            "augmentation": self._draw_augmentation(rng, inputs["image"]),
        }

    def _draw_augmentation(self, rng: np.random.Generator, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.draws.augmentation is None:
            return {}
        return {name: draw(self.draws.augmentation, rng, image.shape[0]) for name, image in images.items()}

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack samples; images stay uint8, a quarter of the bytes to move."""

        def stacked(values: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(values).astype(np.float32))

        numbers = {key: stacked([sample[key] for sample in samples]) for key in ("actions", "noise", "time")}
        drawn = samples[0]["augmentation"]
        augmentation = {name: stacked([sample["augmentation"][name] for sample in samples]) for name in drawn}
        return {"inputs": stack_inputs(samples), **numbers, "augmentation": augmentation}

    def finish(self, stacked: Mapping[str, Any], device: str | torch.device) -> Batch:
        """The batch of what `collate` returned, on the device, its images augmented there."""
        observation = Observation.from_dict(_to(stacked["inputs"], device))
        if self.draws.augmentation is not None:
            observation = augment(observation, self.draws.augmentation, stacked["augmentation"])
        return Batch(observation, **{key: stacked[key].to(device) for key in ("actions", "noise", "time")})

    def batches(self, places: Iterable[list[Place]], workers: int) -> Iterator[dict[str, Any]]:
        """Collated batches of the places, in their order, prepared ahead by worker processes."""
        loader = DataLoader(
            self,
            batch_sampler=places,
            num_workers=workers,
            collate_fn=self.collate,
            prefetch_factor=4 if workers else None,
            # Not forked: threads of pyarrow and torch would be missing in the child, and their locks held.
            multiprocessing_context="spawn" if workers else None,
        )
        with interrupts_held():  # Ctrl-C is for the loop, which stops after its update; without workers it could not
            return iter(loader)


def _to(tree: Any, device: str | torch.device) -> Any:
    return {key: _to(value, device) for key, value in tree.items()} if isinstance(tree, dict) else tree.to(device)


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """The places of a run's batches: all frames in random order, then all in another one, and so on."""

    num_frames: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    """Not included."""

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            places = []
            for position in range(self.batch_size):
                number = step * self.batch_size + position
                if number // self.num_frames != epoch:
                    epoch = number // self.num_frames
                    order = generator_at(self.seed, "order", epoch).permutation(self.num_frames)
                places.append((int(order[number % self.num_frames]), step, position))
            yield places
