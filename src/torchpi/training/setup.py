"""Setup of a run: episodes, normalization statistics, prompts, and the policies around the model."""

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
from torchpi.data import LeRobotDataset, idle_frames, select_episodes, to_observation
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
    """A dataset of the run, split into training and held-out episodes."""

    config: Source
    """The entry of the recipe."""
    embodiment: Embodiment
    train: LeRobotDataset
    frames: np.ndarray
    """Frames of `train` to train on [F]."""
    holdout: LeRobotDataset | None
    norm_stats: Mapping[str, NormStats]


ROBOTS = "robots"
"""Folder, in the policy of a mixture, of all robots but the first, by `robot_names`."""


def robot_names(embodiments: Sequence[Embodiment]) -> list[str]:
    """A unique name for each dataset of a mixture: the robot's name, numbered if it occurs more than once."""
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
    """Open the datasets and hold out episodes.

    Args:
        sizes: the model's config.
        init: the initial checkpoint, whose statistics the recipe may use.
        held_out: the held-out episodes of a resumed run, per dataset; by default `hold_out` chooses them.
    """
    held_out_per_source = [None] * len(config.data.sources) if held_out is None else held_out
    horizon = sizes.require("action_horizon")
    data = []
    for source, episodes in zip(config.data.sources, held_out_per_source, strict=True):
        try:
            data.append(_open_source(source, config, init, horizon, episodes))
        except TorchpiError as error:
            if config.data.mixture:
                error.add_note(f"({source.dataset} is part of a mixture: its options are in its entry in the recipe.)")
            raise
    _check_rates(data)
    return data


def _check_rates(data: Sequence[SourceData]) -> None:
    """Refuse datasets of one robot at different rates: the model could not tell how fast to move."""
    for one, other in itertools.combinations(data, 2):
        same_robot = one.embodiment == dataclasses.replace(other.embodiment, control_hz=one.embodiment.control_hz)
        if same_robot and not same_rate(one.train.fps, other.train.fps):
            raise TrainingError(
                f"Robot '{one.embodiment.name}' acts at {one.train.fps:g} Hz in {one.config.dataset} and at "
                f"{other.train.fps:g} Hz in {other.config.dataset}, by their frames per second. State control_hz in "
                "the embodiment, and fps in the mixture for the dataset that was recorded at another rate."
            )


def _open_source(
    source: Source, config: TrainConfig, init: Checkpoint | None, horizon: int, held_out: Sequence[int] | None
) -> SourceData:
    embodiment = get_embodiment(source.embodiment)
    open_episodes = functools.partial(
        LeRobotDataset,
        source.dataset,
        action_horizon=horizon,
        embodiment=embodiment,  # cameras that the robot lacks are not decoded
        columns=(),
        image_cache_bytes=int(config.data.image_cache_gb * 1e9),
        rename=parse_rename(source.rename),
        prompt=source.prompt,
        fps=source.fps,
        tolerance_s=source.tolerance_s,
    )
    selected = None if source.episodes is None else select_episodes(source.dataset, source.episodes)
    dataset = open_episodes(episodes=selected)
    embodiment.to_model(to_observation(dataset[0], embodiment))  # raises an error if the robot and the data don't fit
    if problems := unit_problems(dataset, embodiment):
        raise TrainingError(problems[0])
    indices = dataset.episode_indices
    excluded = set(_choose_held_out(source, config, indices) if held_out is None else held_out)
    train = open_episodes(episodes=[index for index in indices if index not in excluded]) if excluded else dataset
    holdout = open_episodes(episodes=excluded) if excluded else None
    frames = train.new_images
    if config.data.skip_idle:
        frames = frames[~idle_frames(train)[frames]]
    if len(frames) < config.batch_size:
        raise TrainingError(
            f"{source.dataset} has {counted(len(frames), 'frame')} to train on, fewer than a batch of "
            f"{config.batch_size}; record more, or use a smaller batch_size."
        )
    stats = _norm_stats(source, init, train, embodiment, horizon)
    return SourceData(source, with_rate(embodiment, train.fps), train, frames, holdout, stats)


def _choose_held_out(source: Source, config: TrainConfig, indices: Sequence[int]) -> list[int]:
    """Choose the episodes that a new run holds out."""
    if not config.eval.holdout:
        return []
    if len(indices) < 2:
        raise TrainingError(
            f"{source.dataset} has {len(indices)} episode, of which none can be held out; record more, or train with "
            "holdout 0."
        )
    # With one prompt for all episodes, they count as one task.
    tasks = {
        episode.index: episode.tasks if source.prompt is None else ()
        for episode in open_metadata(source.dataset).episodes
    }
    rng = generator_at(config.seed, "holdout")
    return [indices[i] for i in hold_out([tasks[index] for index in indices], config.eval.holdout, rng)]


def _norm_stats(
    source: Source, init: Checkpoint | None, train: LeRobotDataset, embodiment: Embodiment, horizon: int
) -> Mapping[str, NormStats]:
    origin, _, asset_id = source.norm_stats.partition(":")
    if source.norm_stats == "dataset":
        computed = distributions(train, embodiment, action_horizon=horizon)
        return {key: distribution.stats for key, distribution in computed.items()}
    if origin != "init":
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
    asset_id = asset_id or embodiment.asset_id or ""
    if asset_id not in spec.assets:
        raise TrainingError(
            f"norm_stats {source.norm_stats!r}: {init.address} has statistics for "
            f"{', '.join(spec.assets) or 'no robot'}; choose one as init:ASSET_ID "
            "(torchpi stats --compare shows which fit), or use those of the dataset."
        )
    return load_norm_stats(spec.assets[asset_id])


def build_policies(
    config: TrainConfig, model: Pi0, data: Sequence[SourceData], init: Checkpoint | None = None
) -> list[Policy]:
    """Build a policy for each dataset's robot, around one model, with the preprocessing of the initial checkpoint."""
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
                default_prompt=source.config.prompt,
                metadata={MAX_ACTION_PREFIX: max_prefix} if max_prefix else {},
                provenance=_provenance(config, source),
            ),
        )
        for source in data
    ]


def check_simulation(config: TrainConfig, policy: Policy) -> None:
    """Check the simulator's robot, tasks and episodes now, instead of at the first checkpoint."""
    from torchpi.sim import simulator
    from torchpi.sim.actors import check_embodiment, chosen_tasks
    from torchpi.sim.evaluate import check_numbers

    if (env := config.eval.env) is not None:
        check_embodiment(policy.embodiment, simulator(env).embodiment)
        chosen_tasks(policy.provenance, env, config.eval.tasks)
        check_numbers(env, config.eval.env_episodes, 0, config.seed, None)


def check_videos(data: Sequence[SourceData], console: Console) -> None:
    """Check the lengths of all videos now, instead of failing hours later."""
    with Progress(console=console, transient=True) as progress:
        for dataset in (part for source in data for part in (source.train, source.holdout) if part is not None):
            task = progress.add_task(f"videos of {dataset.path.name}", total=None)

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            dataset.check_videos(show)


def check_prompts(policies: Sequence[Policy], data: Sequence[SourceData]) -> dict[str, int]:
    """Count the tokens of each task's longest prompt; raise an error if one exceeds the model's maximum."""
    num_tokens = dict[str, int]()
    for policy, source in zip(policies, data, strict=True):
        num_tokens |= _longest_prompts(policy, source)
    return num_tokens


def _longest_prompts(policy: Policy, data: SourceData) -> dict[str, int]:
    transforms = policy.transforms
    values = ModelValues.of(data.train, data.embodiment, action_horizon=1)
    stats, rule = transforms.norm_stats["state"], transforms.normalization["state"]
    states = np.asarray(normalize(values.state, stats, rule, what="state"))
    bins = digitize_state(states.ravel()).reshape(states.shape)
    num_digits = np.char.str_len(bins.astype(str)).sum(axis=1)  # about one token per digit
    tasks, longest = data.train.columns["task_index"], dict[str, int]()
    for task in np.unique(tasks).tolist():
        rows = np.flatnonzero(tasks == task)
        text = data.train.tasks[task]
        count = transforms.num_prompt_tokens(text, states[rows[np.argmax(num_digits[rows])]])
        longest[text] = max(longest.get(text, 0), count)
    limit = transforms.max_token_len
    too_long = {text: count for text, count in longest.items() if limit is not None and count > limit}
    if too_long:
        text, count = max(too_long.items(), key=lambda item: item[1])
        raise TrainingError(
            f"{len(too_long)} of the {len(longest)} tasks of {data.config.dataset} have prompts longer than the "
            f"model's max_token_len {limit}; the longest has {count} tokens: {text!r}. Shorten it, or train with a "
            "larger max_token_len (--model with a JSON file, and --adapt)."
        )
    # Warns once about dimensions that never vary, by name; otherwise every worker process would.
    policy.prepare(to_observation(data.train[int(data.frames[0])], data.embodiment))
    return longest


def _provenance(config: TrainConfig, data: SourceData) -> dict[str, Any]:
    """The recipe, and the dataset's own provenance, reduced to the episodes that editing has left in the dataset."""
    provenance: dict[str, Any] = {"source": "torchpi train", "recipe": dataclasses.asdict(config)}
    file = pathlib.Path(data.train.path) / "meta" / "torchpi_recording.json"
    if file.is_file():
        recording, metadata = read_json_object(file, error=TrainingError), open_metadata(data.train.path)
        if not isinstance(recording.get("tasks"), dict):
            raise TrainingError(f"{file} has no object 'tasks': it is damaged. Get the dataset again, or delete it.")
        recording.pop("episodes", None)  # they follow from the seed
        instructions = set(metadata.tasks.values())
        tasks = {task: text for task, text in recording["tasks"].items() if text in instructions}
        lengths = [episode.length for episode in metadata.episodes]
        counts = {"num_episodes": len(lengths), "num_frames": sum(lengths)}
        provenance |= {"dataset": {**recording, "tasks": tasks, **counts}, "tasks": list(tasks)}
    return {**provenance, "torchpi": __version__}
