"""The training loader on a data set: samples a second, time per decoded frame, and whether a step would wait."""

import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np
from rich.console import Console

from torchpi.assets import assets
from torchpi.config import Pi0Config
from torchpi.data import LeRobotDataset, camera_keys_of, select_episodes
from torchpi.data.place import open_metadata
from torchpi.errors import UsageError
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment, get_embodiment
from torchpi.training.samples import Draws, Frames, Samples, TrainingOrder
from torchpi.transforms.normalize import Normalization, NormStats
from torchpi.transforms.pipeline import QUANTITIES, Transforms
from torchpi.transforms.prompt import load_tokenizer

_NUM_FRAMES = 200
"""Timed one by one, in random order."""


@dataclasses.dataclass(frozen=True)
class DataResult:
    """What was measured."""

    samples_per_second: float
    """Of the training loader, once its processes run."""
    frame_ms: float
    """To decode one image of one camera, in random order, in one process."""
    cameras: tuple[str, ...]
    batch: int
    workers: int
    batch_seconds: float
    step_seconds: float | None
    """Of the training step that was asked about."""
    wait_share: float | None
    """Of the time, in which such a step would wait for data."""


def bench_data(
    path: str,
    *,
    embodiment: str | None,
    config: Pi0Config,
    batch: int,
    workers: int,
    num_batches: int,
    step_seconds: float | None = None,
    episodes: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> DataResult:
    """Measure the training loader on a data set.

    Args:
        path: the data set's folder or address.
        embodiment: its robot; None: one that reads all of the set's cameras.
        config: sizes of the model: horizon, image size, prompt length.
        batch: samples in a batch.
        workers: processes; 0: this one.
        num_batches: batches that are timed, after a first one.
        step_seconds: of a training step; its share of waiting is computed.
        episodes: which to read, see `select_episodes`; None: all.
        rename: LeRobot's names for some columns and cameras, see `LeRobotDataset`.
    """
    robot = None if embodiment is None else get_embodiment(embodiment)
    all_cameras = open_metadata(path, rename=rename).camera_keys
    dataset = LeRobotDataset(
        path,
        action_horizon=config.require("action_horizon"),
        episodes=None if episodes is None else select_episodes(path, episodes),
        cameras=all_cameras if robot is None else camera_keys_of(robot, all_cameras),
        columns=(),
        rename=rename,
    )
    frame_seconds = _frame_seconds(dataset) if dataset.camera_keys else 0.0
    samples = _samples(dataset, robot or _any_robot(dataset), config)
    batch_seconds = _batch_seconds(samples, len(dataset), batch, workers, num_batches)
    return DataResult(
        samples_per_second=batch / batch_seconds,
        frame_ms=1e3 * frame_seconds,
        cameras=dataset.camera_keys,
        batch=batch,
        workers=workers,
        batch_seconds=batch_seconds,
        step_seconds=step_seconds,
        wait_share=None if step_seconds is None else wait_share(batch_seconds, step_seconds, workers),
    )


def wait_share(batch_seconds: float, step_seconds: float, workers: int) -> float:
    """The share of the time in which training waits for data.

    Worker processes prepare the next batch during a step, and the step waits for what is longer than itself; without
    them the two take turns.
    """
    if not workers:
        return batch_seconds / (batch_seconds + step_seconds)
    return max(0.0, 1 - step_seconds / batch_seconds)


def _frame_seconds(dataset: LeRobotDataset) -> float:
    """Of an image; the numbers' time is taken off."""
    chosen = generator_at(0, "bench data").integers(0, len(dataset), _NUM_FRAMES).tolist()
    dataset[chosen[0]]  # opens files

    def seconds(read: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for i in chosen:
            read(i)
        return time.perf_counter() - start

    return (seconds(dataset.__getitem__) - seconds(dataset.numbers)) / _NUM_FRAMES / len(dataset.camera_keys)


def _batch_seconds(samples: Samples, num_frames: int, batch: int, workers: int, num_batches: int) -> float:
    order = TrainingOrder(
        frames=[np.arange(num_frames)],
        weights=[1.0],
        batch_size=batch,
        accumulate=1,
        seed=0,
        first_step=0,
        last_step=num_batches + 1,
    )
    batches = iter(samples.batches(order, workers))
    next(batches)  # the processes start
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    return (time.perf_counter() - start) / num_batches


def _samples(dataset: LeRobotDataset, robot: Embodiment, config: Pi0Config) -> Samples:
    # Which statistics and which words there are changes nothing in the time; computing them would take some.
    stats = NormStats(np.zeros(config.action_dim), np.ones(config.action_dim))
    transforms = Transforms(
        norm_stats=dict.fromkeys(QUANTITIES, stats),
        normalization=dict.fromkeys(QUANTITIES, Normalization("z_score")),
        tokenizer=load_tokenizer(assets() / "tiny_tokenizer.model"),
        discrete_state_input=config.pi05 if config.discrete_state_input is None else config.discrete_state_input,
        max_token_len=None,
        action_dim=config.action_dim,
        image_size=(config.image_size, config.image_size),
    )
    return Samples([Frames(dataset, robot, transforms)], Draws(seed=0, num_draws=1))


def _any_robot(dataset: LeRobotDataset) -> Embodiment:
    cameras = [key.split(".")[-1] for key in dataset.camera_keys]
    dims = {name: dataset.columns[name].shape[1] for name in ("observation.state", "action")}
    return Embodiment.generic(
        "data set",
        cameras={camera: camera for camera in cameras},
        state=[f"state_{i}" for i in range(dims["observation.state"])],
        actions=[f"action_{i}" for i in range(dims["action"])],
    )


def run_bench_data(
    path: str,
    *,
    embodiment: str | None,
    config: Pi0Config,
    batch: int,
    workers: int,
    num_batches: int,
    step_seconds: float | None,
    episodes: str | None,
    rename: Mapping[str, str],
    as_json: bool,
) -> None:
    """Measure and print."""
    if batch < 1 or num_batches < 1 or workers < 0 or (step_seconds is not None and step_seconds <= 0):
        raise UsageError(
            f"Expected positive numbers, got batch {batch}, repeats {num_batches}, workers {workers}, step_seconds "
            f"{step_seconds}."
        )
    with Console(stderr=True).status(f"reading {path}"):  # shown on a terminal only
        result = bench_data(
            path,
            embodiment=embodiment,
            config=config,
            batch=batch,
            workers=workers,
            num_batches=num_batches,
            step_seconds=step_seconds,
            episodes=episodes,
            rename=rename,
        )
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    console.print(
        f"{pathlib.PurePath(path).name}: {result.samples_per_second:.1f} samples/s with {workers} workers, "
        f"{result.batch_seconds:.3f} s per batch of {batch}; {result.frame_ms:.2f} ms per decoded frame of "
        f"{len(result.cameras)} cameras"
    )
    if result.wait_share is not None:
        console.print(f"a training step of {step_seconds:g} s would wait for data {result.wait_share:.0%} of the time")
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
