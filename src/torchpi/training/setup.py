"""From a recipe to what is trained: the episodes, and the policy before its first update."""

import dataclasses
import json
import pathlib
from typing import Any

import torch

import torchpi
from torchpi.assets import assets
from torchpi.config import PRESETS, Pi0Config, preset
from torchpi.data import LeRobotDataset, compute_norm_stats, to_observation
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.randomness import generator_at
from torchpi.robots import Embodiment, get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.transforms.normalize import Normalization, load_norm_stats


@dataclasses.dataclass(frozen=True)
class Data:
    """The dataset, cut into what is trained on and what is measured."""

    train: LeRobotDataset
    holdout: LeRobotDataset | None
    embodiment: Embodiment


def model_config(config: TrainConfig) -> Pi0Config:
    """The model's sizes.

    Raises:
        ValueError: `model` is neither a preset nor a file, or the file is wrong.
    """
    if config.model in PRESETS:
        return preset(config.model)
    if not pathlib.Path(config.model).is_file():
        raise ValueError(f"model {config.model!r} is neither a file nor a preset; presets are {', '.join(PRESETS)}")
    return Pi0Config.from_json(config.model)


def open_data(config: TrainConfig) -> Data:
    """Open the dataset and hold episodes out.

    Raises:
        FileNotFoundError, KeyError, ValueError: as `LeRobotDataset`; or there are too few episodes to hold some out.
    """
    embodiment = get_embodiment(config.embodiment)
    horizon = model_config(config).require("action_horizon")
    whole = LeRobotDataset(config.dataset, action_horizon=horizon)
    embodiment.to_model(to_observation(whole[0], embodiment))  # says what does not fit before anything is written
    num_episodes = len(whole.episode_lengths)
    count = max(1, round(config.holdout * num_episodes)) if config.holdout else 0
    if count >= num_episodes:
        raise ValueError(
            f"{config.dataset} has {num_episodes} episodes, of which {count} would be held out; record more, or train "
            "with holdout 0"
        )
    if not count:
        return Data(whole, None, embodiment)
    order = generator_at(config.seed, "holdout").permutation(num_episodes).tolist()
    part = [
        LeRobotDataset(config.dataset, action_horizon=horizon, episodes=sorted(order[cut]))
        for cut in (slice(count, None), slice(count))
    ]
    return Data(part[0], part[1], embodiment)


def build_policy(config: TrainConfig, data: Data) -> Policy:
    """The policy before the first update: random weights, statistics of the episodes that are trained on."""
    sizes = model_config(config)
    model = Pi0(sizes, device=config.device, compute_dtype=getattr(torch, config.dtype))
    model.init_weights(torch.Generator(config.device).manual_seed(config.seed))
    kind = "quantile" if sizes.pi05 else "z_score"
    if config.norm_stats is not None:
        stats = load_norm_stats(config.norm_stats)
    else:
        stats = compute_norm_stats(data.train, data.embodiment, action_horizon=sizes.require("action_horizon"))
    return Policy(
        model,
        data.embodiment,
        norm_stats=stats,
        normalization={key: Normalization(kind, "openpi") for key in ("state", "actions")},
        tokenizer=config.tokenizer or assets() / "tiny_tokenizer.model",
        provenance=_provenance(config),
    )


def _provenance(config: TrainConfig) -> dict[str, Any]:
    """The recipe, and what the dataset says of its own making."""
    provenance: dict[str, Any] = {"source": "torchpi train", "recipe": dataclasses.asdict(config)}
    recording = pathlib.Path(config.dataset) / "meta" / "torchpi_recording.json"
    if recording.is_file():
        recorded = json.loads(recording.read_text(encoding="utf-8"))
        episodes = recorded.pop("episodes")  # the seed decides them
        frames = sum(episode["length"] for episode in episodes)
        provenance["dataset"] = {**recorded, "num_episodes": len(episodes), "num_frames": frames}
        provenance["tasks"] = list(recorded["tasks"])
    return {**provenance, "torchpi": torchpi.__version__}
