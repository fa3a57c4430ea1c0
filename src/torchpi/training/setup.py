"""The data of a recipe: episodes, statistics, prompts, and the policy around the model."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from torchpi.checkpoints.address import existing_file
from torchpi.checkpoints.checkpoint import Checkpoint
from torchpi.checkpoints.spec import MAX_ACTION_PREFIX, PolicySpec
from torchpi.config import Pi0Config
from torchpi.data import (
    LeRobotDataset,
    idle_frames,
    select_episodes,
    to_observation,
)
from torchpi.data.episodes import hold_out
from torchpi.data.fit import unit_problems
from torchpi.data.metadata import open_metadata
from torchpi.data.rate import same_rate, with_rate
from torchpi.data.rename import parse_rename
from torchpi.data.stats import ModelValues, distributions
from torchpi.errors import TorchpiError, TrainingError, counted
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy, policy_of
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment, get_embodiment
from torchpi.schema import read_json_object
from torchpi.training.config import Source, TrainConfig
from torchpi.transforms.normalize import NormStats, load_norm_stats, normalize
from torchpi.transforms.prompt import digitize_state
from torchpi.version import __version__


@dataclasses.dataclass(frozen=True)
class SourceData:
    """A dataset of the run: training and held-out episodes."""

    source: Source
    embodiment: Embodiment
    train: LeRobotDataset
    frames: np.ndarray
    """Numbers of the frames of `train` that are trained on [F]."""
    holdout: LeRobotDataset | None
    norm_stats: Mapping[str, NormStats]


ROBOTS = "robots"
"""Folder of the other robots in the policy of a mixture, by `robot_names`."""


def robot_names(embodiments: Sequence[Embodiment]) -> list[str]:
    """A unique name for each dataset of a mixture: the robot's, if need be with a number."""
    names = [embodiment.name for embodiment in embodiments]
    numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if number == 1 else f"{name}_{number}" for name, number in zip(names, numbers, strict=True)]


def open_data(
    config: TrainConfig,
    sizes: Pi0Config,
    init: Checkpoint | None = None,
    *,
    held_out: Sequence[Sequence[int]] | None = None,
) -> list[SourceData]:
    """Open the datasets and hold episodes out.

    Args:
        sizes: of the model.
        init: the initial checkpoint, whose statistics may be used.
        held_out: the episodes that a resumed run holds out, per dataset; by default they are chosen, see `hold_out`.
    """
    recorded = [None] * len(config.data.sources) if held_out is None else held_out
    horizon = sizes.require("action_horizon")
    data = []
    for source, held in zip(config.data.sources, recorded, strict=True):
        try:
            data.append(_open_source(source, config, init, horizon, held))
        except TorchpiError as error:
            if config.data.mixture:
                error.add_note(f"({source.dataset} is in a mixture: its options are those of its entry in the recipe.)")
            raise
    _check_rates(data)
    return data


def _check_rates(data: Sequence[SourceData]) -> None:
    """Refuse datasets of one robot at several rates: the model could not tell how fast it shall move."""
    for one, other in itertools.combinations(data, 2):
        is_same = one.embodiment == dataclasses.replace(other.embodiment, control_hz=one.embodiment.control_hz)
        if is_same and not same_rate(one.train.fps, other.train.fps):
            raise TrainingError(
                f"Robot '{one.embodiment.name}' acts at {one.train.fps:g} Hz in {one.source.dataset} and at "
                f"{other.train.fps:g} Hz in {other.source.dataset}, by their frames per second. State its control_hz "
                "in the embodiment, and fps in the mixture for a dataset that was recorded at another rate."
            )


def _open_source(
    source: Source, config: TrainConfig, init: Checkpoint | None, horizon: int, recorded: Sequence[int] | None
) -> SourceData:
    embodiment = get_embodiment(source.embodiment)
    rename = parse_rename(source.rename)
    open_episodes = functools.partial(
        LeRobotDataset,
        source.dataset,
        action_horizon=horizon,
        embodiment=embodiment,  # other cameras are not decoded
        columns=(),
        image_cache_bytes=int(config.data.image_cache_gb * 1e9),
        rename=rename,
        prompt=source.prompt,
        fps=source.fps,
        tolerance_s=source.tolerance_s,
    )
    chosen = None if source.episodes is None else select_episodes(source.dataset, source.episodes)
    whole = open_episodes(episodes=chosen)
    embodiment.to_model(to_observation(whole[0], embodiment))  # says what does not fit before anything is written
    if problems := unit_problems(whole, embodiment):
        raise TrainingError(problems[0])
    indices = whole.episode_indices
    held = set(_choose_held_out(source, config, indices) if recorded is None else recorded)
    kept = [index for index in indices if index not in held]
    train = open_episodes(episodes=kept) if held else whole
    holdout = open_episodes(episodes=held) if held else None
    frames = train.new_images
    if config.data.skip_idle:
        frames = frames[~idle_frames(train)[frames]]
    if len(frames) < config.batch_size:
        raise TrainingError(
            f"{source.dataset} has {counted(len(frames), 'frame')} to train on, fewer than a batch of "
            f"{config.batch_size}; record more, or take a smaller batch_size."
        )
    stats = _norm_stats(source, init, train, embodiment, horizon)
    return SourceData(source, with_rate(embodiment, train.fps), train, frames, holdout, stats)


def _choose_held_out(source: Source, config: TrainConfig, indices: Sequence[int]) -> list[int]:
    """The episodes that a new run holds out."""
    if not config.eval.holdout:
        return []
    if len(indices) < 2:
        raise TrainingError(
            f"{source.dataset} has {len(indices)} episode, of which none can be held out; record more, or train with "
            "holdout 0."
        )
    # With one instruction for all, the episodes have one task.
    tasks = {
        episode.index: episode.tasks if source.prompt is None else ()
        for episode in open_metadata(source.dataset).episodes
    }
    rng = generator_at(config.seed, "holdout")
    return [indices[i] for i in hold_out([tasks[index] for index in indices], config.eval.holdout, rng)]


def _norm_stats(
    source: Source, init: Checkpoint | None, train: LeRobotDataset, embodiment: Embodiment, horizon: int
) -> Mapping[str, NormStats]:
    where, _, asset_id = source.norm_stats.partition(":")
    if source.norm_stats == "dataset":
        found = distributions(train, embodiment, action_horizon=horizon)
        return {what: values.stats for what, values in found.items()}
    if where != "init":
        return load_norm_stats(source.norm_stats)
    if init is None:
        raise TrainingError(f"norm_stats {source.norm_stats!r} needs initial weights: set init (--init).")
    spec = init.spec()
    if spec.norm_stats is not None:
        if asset_id:
            raise TrainingError(
                f"{init.address} has statistics of its own: norm_stats must be init, without {asset_id!r}."
            )
        return spec.norm_stats
    spec.require_statistics()
    files = spec.assets
    asset_id = asset_id or embodiment.asset_id or ""
    if asset_id not in files:
        raise TrainingError(
            f"norm_stats {source.norm_stats!r}: {init.address} has statistics for "
            f"{', '.join(files) or 'no robot'}; choose one as init:ASSET_ID "
            "(torchpi stats --compare shows which fit), or take those of the dataset."
        )
    return load_norm_stats(files[asset_id])


def build_policies(
    config: TrainConfig, model: Pi0, data: Sequence[SourceData], init: Checkpoint | None = None
) -> list[Policy]:
    """A policy for each dataset's robot, around one model, with the preprocessing of the initial checkpoint."""
    spec = PolicySpec("no checkpoint") if init is None else init.spec()
    if spec.normalization is None:  # openpi's checkpoints don't state their preprocessing
        spec = PolicySpec(spec.source)
    spec = spec.preprocessed_by(config.model.preprocessing)
    if config.model.tokenizer:
        spec = dataclasses.replace(spec, tokenizer=existing_file(config.model.tokenizer))
    spec = spec.with_tokenizer(model.config.vocab_size)
    max_prefix = config.optim.max_action_prefix
    model.trained_action_dim = max(model.trained_action_dim, *(source.embodiment.action_size for source in data))
    return [
        policy_of(
            model,
            dataclasses.replace(
                spec,
                embodiment=source.embodiment,
                norm_stats=source.norm_stats,
                default_prompt=source.source.prompt,
                metadata={MAX_ACTION_PREFIX: max_prefix} if max_prefix else {},
                provenance=_provenance(config, source),
            ),
        )
        for source in data
    ]


def check_simulation(config: TrainConfig, policy: Policy) -> None:
    """Find now, and not at the first checkpoint, that `env` is of another robot, or has no such tasks or episodes."""
    from torchpi.sim import simulator
    from torchpi.sim.actors import check_embodiment, chosen_tasks
    from torchpi.sim.evaluate import check_numbers

    if (env := config.eval.env) is not None:
        check_embodiment(policy.embodiment, simulator(env).embodiment)
        chosen_tasks(policy.provenance, env, config.eval.tasks)
        check_numbers(env, config.eval.env_episodes, 0, config.seed, None)


def check_videos(data: Sequence[SourceData], console: Console) -> None:
    """Find a video that is too short now, and not hours later."""
    with Progress(console=console, transient=True) as progress:
        for dataset in (part for source in data for part in (source.train, source.holdout) if part is not None):
            task = progress.add_task(f"videos of {dataset.path.name}", total=None)

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            dataset.check_videos(show)


def check_prompts(policies: Sequence[Policy], data: Sequence[SourceData]) -> dict[str, int]:
    """The number of tokens of each task's longest prompt, or an error if one does not fit."""
    longest = dict[str, int]()
    for policy, source in zip(policies, data, strict=True):
        longest |= _longest_prompts(policy, source)
    return longest


def _longest_prompts(policy: Policy, data: SourceData) -> dict[str, int]:
    transforms = policy.transforms
    values = ModelValues.of(data.train, data.embodiment, action_horizon=1)
    stats, rule = transforms.norm_stats["state"], transforms.normalization["state"]
    states = np.asarray(normalize(values.state, stats, rule, what="state"))
    bins = digitize_state(states.ravel()).reshape(states.shape)
    digits = np.char.str_len(bins.astype(str)).sum(axis=1)  # one token each, or nearly so
    tasks, longest = data.train.columns["task_index"], dict[str, int]()
    for index in np.unique(tasks).tolist():
        rows = np.flatnonzero(tasks == index)
        text = data.train.tasks[index]
        count = transforms.num_prompt_tokens(text, states[rows[np.argmax(digits[rows])]])
        longest[text] = max(longest.get(text, 0), count)
    limit = transforms.max_token_len
    if limit is not None and (too_long := {text: count for text, count in longest.items() if count > limit}):
        text, count = max(too_long.items(), key=lambda item: item[1])
        raise TrainingError(
            f"{len(too_long)} of the {len(longest)} tasks of {data.source.dataset} have prompts longer than the "
            f"model's max_token_len {limit}; the longest has {count} tokens: {text!r}. Shorten it, or train with a "
            "larger max_token_len (--model with a JSON file, and --adapt)."
        )
    # Warns of dimensions that never vary, by name and before the worker processes would, each for itself.
    policy.prepare(to_observation(data.train[int(data.frames[0])], data.embodiment))
    return longest


def _provenance(config: TrainConfig, data: SourceData) -> dict[str, Any]:
    """The recipe, and the dataset's own provenance, of the episodes that an edit has left in it."""
    provenance: dict[str, Any] = {"source": "torchpi train", "recipe": dataclasses.asdict(config)}
    recording = pathlib.Path(data.train.path) / "meta" / "torchpi_recording.json"
    if recording.is_file():
        recorded, metadata = read_json_object(recording, error=TrainingError), open_metadata(data.train.path)
        if not isinstance(recorded.get("tasks"), dict):
            raise TrainingError(
                f"{recording} has no object 'tasks': it is damaged. Get the dataset again, or delete it."
            )
        recorded.pop("episodes", None)  # the seed decides them
        texts, lengths = set(metadata.tasks.values()), [episode.length for episode in metadata.episodes]
        tasks = {task: text for task, text in recorded["tasks"].items() if text in texts}
        counts = {"num_episodes": len(lengths), "num_frames": sum(lengths)}
        provenance |= {"dataset": {**recorded, "tasks": tasks, **counts}, "tasks": list(tasks)}
    return {**provenance, "torchpi": __version__}
