"""The samples of a run: their order, their random numbers and their batches.

The random numbers of a sample depend only on the seed, the step and the sample's position in the batch.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from torchpi.collate import stack_inputs
from torchpi.config import Pi0Config
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.observations import to_observation
from torchpi.errors import TrainingError
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment
from torchpi.training.augment import OFF, Augmentation, augment, draw
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import to_device
from torchpi.transforms.images import black_like
from torchpi.transforms.pipeline import Transforms
from torchpi.types import Observation

SampleIndex = tuple[int, int, int, int]
"""Index of the dataset in the mixture, frame, step, position in the batch."""
_BLOCK = 1 << 16
"""Number of consecutive samples in which the datasets are mixed according to their weights."""


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Sample indices of one process, per micro-batch.

    Each epoch visits all frames of a dataset in a new random order. A mixture is drawn in blocks: within a block each
    dataset contributes samples in proportion to its weight, in random order. The index of a sample therefore depends
    only on its number since the start of the run, and a resumed run needs nothing but the step.
    """

    frames: Sequence[Int[np.ndarray, " _"]]
    """Frame numbers to train on, per dataset."""
    config: TrainConfig
    first_step: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.config.micro_batch_size(self.world_size)  # raises an error if the batch can't be divided
        weights = [source.weight for source in self.config.data.sources]
        if min(weights) / sum(weights) * _BLOCK < 2:
            raise TrainingError(f"A dataset with the weight {min(weights)} of {sum(weights)} is hardly ever drawn.")

    def __len__(self) -> int:
        return (self.config.num_steps - self.first_step) * self.config.grad_accum_steps

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        config = self.config
        size = config.micro_batch_size(self.world_size)
        mixture = functools.lru_cache(1)(self._mixture)
        shuffled = functools.lru_cache(2 * len(self.frames))(self._shuffled)
        for step in range(self.first_step, config.num_steps):
            for micro_batch in range(config.grad_accum_steps):
                start = (micro_batch * self.world_size + self.rank) * size
                indices = []
                for position in range(start, start + size):
                    block, offset = divmod(step * config.batch_size + position, _BLOCK)
                    sources, counts = mixture(block)
                    source = int(sources[offset])
                    epoch, frame = divmod(int(counts[offset]), len(self.frames[source]))
                    indices.append((source, int(shuffled(source, epoch)[frame]), step, position))
                yield indices

    def _mixture(self, block: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The dataset of each sample in a block, and the number of earlier samples from that dataset."""
        weights = [source.weight for source in self.config.data.sources]
        boundaries = np.cumsum(weights) / np.sum(weights)
        ends = np.rint(boundaries * _BLOCK * np.array([[block], [block + 1]])).astype(np.int64)
        before, after = np.diff(ends, prepend=0)  # samples from each dataset before and after the block
        in_order = np.repeat(np.arange(len(weights)), after - before)
        sources = generator_at(self.config.seed, "mixture", block).permutation(in_order)
        counts = np.empty_like(sources)
        for source, start in enumerate(before):
            is_source = sources == source
            counts[is_source] = start + np.arange(is_source.sum())
        return sources, counts

    def _shuffled(self, source: int, epoch: int) -> Int[np.ndarray, " _"]:
        """The frames of a dataset, in the order of an epoch."""
        return generator_at(self.config.seed, "order", source, epoch).permutation(self.frames[source])


@dataclasses.dataclass(frozen=True)
class SampleRng:
    """Settings of a sample's random numbers; see `OptimConfig` and `DataConfig`."""

    seed: int
    flow_samples_per_obs: int
    state_noise: float = 0.0
    augmentation: Augmentation | None = None
    max_action_prefix: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch on the device; R is `flow_samples_per_obs`."""

    observation: Observation
    actions: Float32[Tensor, "B H A"]
    """Normalized and padded to action_dim."""
    is_real: Bool[Tensor, "B H A"]
    """False for padded dimensions and for steps past the end of the episode."""
    noise: Float32[Tensor, "B R H A"]
    time: Float32[Tensor, "B R"]
    indices: tuple[SampleIndex, ...]
    prefix_len: Int[Tensor, "B R"] | None = None
    """Length of the action prefix, see `Pi0.forward`."""

    def loss_mask(self, elements: str) -> Bool[Tensor, "B R H A"] | None:
        """Mask of the elements that count in the loss: see `OptimConfig.loss`; no action prefix. None if all count."""
        if elements == "all" and self.prefix_len is None:
            return None
        mask = (torch.ones_like(self.is_real) if elements == "all" else self.is_real)[:, None].expand(self.noise.shape)
        if self.prefix_len is None:
            return mask
        step = torch.arange(mask.shape[2], device=mask.device)
        return mask & (step >= self.prefix_len[:, :, None])[..., None]

    def to_tensors(self) -> dict[str, Tensor]:
        """The batch's tensors under flat names, to save a failed batch."""
        observation = self.observation
        tensors = {f"image.{name}": image for name, image in observation.images.items()}
        tensors |= {f"image_mask.{name}": mask for name, mask in observation.image_masks.items()}
        tensors |= {name: getattr(observation, name) for name in ("state", "tokenized_prompt", "tokenized_prompt_mask")}
        tensors |= {name: getattr(self, name) for name in ("actions", "is_real", "noise", "time")}
        return {**tensors, "indices": torch.tensor(self.indices)}


def example_batch(
    sizes: Pi0Config, cameras: Iterable[str], samples: int, flow_samples: int, device: torch.device
) -> Batch:
    """A batch of zeros with the shapes and dtypes of `Samples.finish` and prompts of the maximum length."""
    side, length = sizes.image_size, sizes.require("max_token_len")
    chunk = (sizes.require("action_horizon"), sizes.action_dim)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(samples, *shape, dtype=dtype, device=device)

    observation = Observation(
        images={name: zeros(side, side, 3) for name in cameras},
        image_masks={name: zeros(dtype=torch.bool) for name in cameras},
        state=zeros(sizes.action_dim),
        tokenized_prompt=zeros(length, dtype=torch.int64),
        tokenized_prompt_mask=zeros(length, dtype=torch.bool),
    )
    is_real = zeros(*chunk, dtype=torch.bool)
    return Batch(observation, zeros(*chunk), is_real, zeros(flow_samples, *chunk), zeros(flow_samples), indices=())


def loss_sum(forward: Any, batch: Batch, elements: str) -> Tensor:
    """Sum of the loss elements over a batch, see `OptimConfig.loss`."""
    loss = forward(
        batch.observation,
        batch.actions,
        noise=batch.noise,
        time=batch.time,
        prefix_len=batch.prefix_len,
        loss_mask=batch.loss_mask(elements),
    )  # [B, R, H]
    return loss.sum() * batch.actions.shape[-1]  # `forward` returns the mean over the action dimensions


def num_loss_elements(batch: Batch, elements: str) -> int | Int[Tensor, ""]:
    """Number of elements that `loss_sum` adds up; a tensor on the batch's device if a mask is counted."""
    mask = batch.loss_mask(elements)
    return batch.noise.numel() if mask is None else mask.sum()


@dataclasses.dataclass(frozen=True)
class Frames:
    """A dataset, and the transforms from its frames to the model's inputs."""

    dataset: LeRobotDataset
    embodiment: Embodiment
    transforms: Transforms


class Samples(Dataset):
    """The samples of a run by index. Worker processes load and collate them; the training process calls `finish`."""

    def __init__(self, sources: Sequence[Frames], rng: SampleRng, prompt_lengths: Sequence[int] = ()) -> None:
        self.sources, self.rng, self.prompt_lengths = sources, rng, prompt_lengths
        # If a robot lacks a camera of another robot in the mixture, its image is black and masked.
        self.cameras = tuple(dict.fromkeys(name for source in sources for name in source.embodiment.camera_names))

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        """Load one sample: the model's inputs, the actions, and the random numbers."""
        source_index, frame, step, position = index
        source, config = self.sources[source_index], self.rng
        rng = generator_at(config.seed, "sample", step, position)
        item = source.dataset[frame]
        sample = source.embodiment.to_model(to_observation(item, source.embodiment))
        state_noise = rng.standard_normal(len(sample["state"])) * config.state_noise
        inputs = source.transforms.forward(sample, state_noise=state_noise)
        valid = inputs["tokenized_prompt_mask"]  # padding is dropped: it costs time and changes nothing
        is_real = np.zeros(inputs["actions"].shape, np.bool_)
        is_real[~item["action_is_pad"], : source.embodiment.action_size] = True
        return {
            **self._with_all_cameras(inputs),
            "tokenized_prompt": inputs["tokenized_prompt"][valid],
            "tokenized_prompt_mask": valid[valid],
            "is_real": is_real,
            "noise": rng.standard_normal((config.flow_samples_per_obs, *inputs["actions"].shape), np.float32),
            # Beta(1.5, 1)·0.999 + 0.001, like `flow.sample_time`.
            "time": rng.random(config.flow_samples_per_obs) ** (1 / 1.5) * 0.999 + 0.001,
            "augmentation": self._draw_augmentation(rng, inputs["image"]),
            "prefix_len": rng.integers(0, config.max_action_prefix, config.flow_samples_per_obs, endpoint=True),
            "index": index,
        }

    def _with_all_cameras(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Add a masked black image for each camera that this sample's robot lacks."""
        images, masks = inputs["image"], inputs["image_mask"]
        black = black_like(next(iter(images.values())))
        return {
            **inputs,
            "image": {name: images.get(name, black) for name in self.cameras},
            "image_mask": {name: masks.get(name, np.bool_(False)) for name in self.cameras},
        }

    def _draw_augmentation(self, rng: np.random.Generator, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.rng.augmentation
        if config is None:
            return {}
        size = next(iter(images.values())).shape[0]
        drawn = {name: draw(config, rng, size) for name in images}
        first = next(iter(drawn.values()))
        return {name: first if config.like_openpi else drawn.get(name, OFF) for name in self.cameras}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack samples. Images that the transform returns as uint8 stay uint8, a quarter of the bytes to copy."""

        def stack(values: Iterable[np.ndarray], dtype: Any = np.float32) -> Tensor:
            return torch.from_numpy(np.stack(list(values)).astype(dtype))

        dtypes = {"actions": np.float32, "noise": np.float32, "time": np.float32, "is_real": bool, "prefix_len": int}
        cameras = samples[0]["augmentation"]
        return {
            "inputs": stack_inputs(samples, self.prompt_lengths),
            "prompt_tokens": sum(int(sample["tokenized_prompt_mask"].sum()) for sample in samples),
            **{key: stack((sample[key] for sample in samples), dtype) for key, dtype in dtypes.items()},
            "augmentation": {name: stack(sample["augmentation"][name] for sample in samples) for name in cameras},
            "indices": tuple(sample["index"] for sample in samples),
        }

    def finish(self, collated: Mapping[str, Any], device: str | torch.device) -> Batch:
        """Copy the output of `collate` to the device and augment the images there, without waiting for the device."""
        move = functools.partial(to_device, device=torch.device(device))
        observation = Observation.from_dict(tree_map(move, collated["inputs"]))
        if self.rng.augmentation is not None:
            observation = augment(observation, self.rng.augmentation, collated["augmentation"])
        tensors = {key: move(collated[key]) for key in ("actions", "is_real", "noise", "time")}
        prefix_len = move(collated["prefix_len"]) if self.rng.max_action_prefix else None
        return Batch(observation, **tensors, indices=collated["indices"], prefix_len=prefix_len)

    def batches(
        self, indices: Iterable[list[SampleIndex]], workers: int, *, pinned: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Collated batches in the order of `indices`, prepared ahead of time by worker processes.

        Args:
            pinned: put the batches in pinned memory, for asynchronous copies to a GPU.
        """
        from torchpi.sim.processes import interrupts_held

        loader = DataLoader(
            self,
            batch_sampler=indices,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pinned,
            prefetch_factor=4 if workers else None,
            # Not forked: the child would lack the threads of pyarrow and torch, but inherit their locks as held.
            multiprocessing_context="spawn" if workers else None,
        )
        with interrupts_held():  # only the training loop handles Ctrl-C: it needs its workers to finish the update
            return map(_raise_error, loader)

    def __getitems__(self, indices: list[SampleIndex]) -> dict[str, Any] | Exception:
        """A collated batch for the DataLoader, which calls this method with all indices of a batch.

        An error in the user's data is returned, not raised: DataLoader would put the worker's traceback into its
        message.
        """
        try:
            return self.collate([self[index] for index in indices])
        except (FileNotFoundError, KeyError, ValueError) as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _raise_error(batch: dict[str, Any] | Exception) -> dict[str, Any]:
    if isinstance(batch, Exception):
        raise batch
    return batch
