"""`bench data`: samples per second of the training loader, and the fraction of time that training would wait."""

import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from torchpi.assets import assets
from torchpi.config import Pi0Config
from torchpi.data import LeRobotDataset
from torchpi.data.rate import rate_note
from torchpi.errors import UsageError, counted
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment, get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.samples import Frames, SampleRng, Samples, TrainingOrder
from torchpi.transforms.normalize import Normalization, NormStats
from torchpi.transforms.pipeline import QUANTITIES, Transforms
from torchpi.transforms.prompt import load_tokenizer
from torchpi.ui.format import print_json
from torchpi.ui.tables import PlainConsole

_NUM_FRAMES = 200
"""Number of frames to time, read one by one in random order."""


def run_bench_data(
    path: str,
    *,
    embodiment: str | None,
    config: Pi0Config,
    batch: int,
    workers: int,
    repeats: int,
    step_seconds: float | None,
    as_json: bool,
    **dataset_args: Any,
) -> None:
    """Run the benchmark and print its result.

    Args:
        dataset_args: arguments of `LeRobotDataset`; the others are those of the command.
    """
    if batch < 1 or repeats < 1 or workers < 0 or (step_seconds is not None and step_seconds <= 0):
        raise UsageError(
            f"Expected positive numbers, got batch {batch}, repeats {repeats}, workers {workers}, step_seconds "
            f"{step_seconds}."
        )
    robot = None if embodiment is None else get_embodiment(embodiment)
    with PlainConsole(stderr=True).status(f"reading {path}"):  # shown on a terminal only
        horizon = config.require("action_horizon")
        dataset = LeRobotDataset(path, action_horizon=horizon, embodiment=robot, columns=(), **dataset_args)
        robot = robot or _generic_robot(dataset)
        frame_ms = 1e3 * _frame_seconds(dataset) if dataset.camera_keys else 0.0
        samples = _samples(dataset, robot, config)
        seconds = _batch_seconds(samples, len(dataset), batch, workers, repeats)
    waiting = None if step_seconds is None else wait_share(seconds, step_seconds, workers)
    console = PlainConsole(stderr=as_json, soft_wrap=True)
    console.print(
        f"{pathlib.PurePath(path).name}: {batch / seconds:.1f} samples/s with {counted(workers, 'worker')}, "
        f"{seconds:.3f} s per batch of {batch}; {frame_ms:.2f} ms per decoded frame of "
        f"{counted(len(dataset.camera_keys), 'camera')}"
    )
    if note := rate_note(dataset.fps, dataset.recorded_fps, robot):
        console.print(f"{path} is {note}")
    if waiting is not None:
        console.print(f"training with steps of {step_seconds:g} s would wait for data {waiting:.0%} of the time")
    if as_json:
        document = {
            "samples_per_second": batch / seconds,
            "frame_ms": frame_ms,
            "cameras": dataset.camera_keys,
            "batch": batch,
            "workers": workers,
            "batch_seconds": seconds,
            "step_seconds": step_seconds,
            "wait_share": waiting,
        }
        print_json(document)


def wait_share(batch_seconds: float, step_seconds: float, workers: int) -> float:
    """Fraction of the time that training waits for data.

    Worker processes load the next batch during a step, so training waits only if loading takes longer than the step.
    Without workers, loading and training alternate.
    """
    if not workers:
        return batch_seconds / (batch_seconds + step_seconds)
    return max(0.0, 1 - step_seconds / batch_seconds)


def _frame_seconds(dataset: LeRobotDataset) -> float:
    """Seconds to decode one image, without the time to read states and actions."""
    indices = generator_at(0, "bench data").integers(0, len(dataset), _NUM_FRAMES).tolist()
    dataset[indices[0]]  # opens files

    def seconds(read: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for i in indices:
            read(i)
        return time.perf_counter() - start

    return (seconds(dataset.__getitem__) - seconds(dataset.numbers)) / _NUM_FRAMES / len(dataset.camera_keys)


def _batch_seconds(samples: Samples, num_frames: int, batch: int, workers: int, num_batches: int) -> float:
    order = TrainingOrder([np.arange(num_frames)], TrainConfig(batch_size=batch, num_steps=num_batches + 1))
    batches = iter(samples.batches(order, workers))
    next(batches)  # starts the worker processes
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    return (time.perf_counter() - start) / num_batches


def _samples(dataset: LeRobotDataset, robot: Embodiment, config: Pi0Config) -> Samples:
    # Dummy statistics and a small tokenizer do not affect the timing; computing real statistics would take long.
    stats = NormStats(np.zeros(config.action_dim), np.ones(config.action_dim))
    transforms = Transforms(
        norm_stats=dict.fromkeys(QUANTITIES, stats),
        normalization=dict.fromkeys(QUANTITIES, Normalization("z_score")),
        tokenizer=load_tokenizer(assets() / "tiny_tokenizer.model"),
        discrete_state_input=config.state_in_prompt,
        max_token_len=None,
        action_dim=config.action_dim,
        image_size=(config.image_size, config.image_size),
    )
    return Samples([Frames(dataset, robot, transforms)], SampleRng(seed=0, flow_samples_per_obs=1))


def _generic_robot(dataset: LeRobotDataset) -> Embodiment:
    """Robot with the dataset's dimensions and its color cameras."""
    cameras = [key.split(".")[-1] for key in dataset.camera_keys if key not in dataset.depth_keys]
    state, action = (dataset.columns[name].shape[1] for name in ("observation.state", "action"))
    return Embodiment.generic(
        "dataset",
        cameras={camera: camera for camera in cameras},
        state=[f"state_{i}" for i in range(state)],
        actions=[f"action_{i}" for i in range(action)],
    )
