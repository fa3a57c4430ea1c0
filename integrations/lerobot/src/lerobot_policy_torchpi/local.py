"""Loading of a `TorchpiConfig`'s policy for inference, or for training on a LeRobot dataset."""

import contextlib
import dataclasses
import pathlib
import tempfile
import warnings
from typing import Any

import torch

import torchpi
from lerobot_policy_torchpi.errors import MissingKeyError, PluginError
from torchpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from torchpi.data import LeRobotDataset, compute_norm_stats
from torchpi.data.fit import unit_problems
from torchpi.data.format import ACTION, STATE
from torchpi.data.observations import in_robot_order
from torchpi.data.rate import same_rate
from torchpi.devices import has_bfloat16
from torchpi.model.lora import trainable_parameters
from torchpi.policy import Policy, policy_of
from torchpi.robots import Embodiment, get_embodiment
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.transforms.normalize import save_norm_stats


def address(config: Any) -> str:
    """Address of the policy: LeRobot's --policy.path, or the option `checkpoint`."""
    if (path := config.pretrained_path) is None:
        if config.checkpoint is None:
            raise MissingKeyError(
                "No policy is given: --policy.type=torchpi needs --policy.checkpoint=ADDRESS (a folder, "
                'hf://ORG/NAME, gs://… or "demo"); a policy that LeRobot saved is --policy.path=FOLDER.'
            )
        return str(config.checkpoint)
    if pathlib.Path(path).is_dir():
        return str(path)
    return f"hf://{path}" + (f"@{config.pretrained_revision}" if config.pretrained_revision else "")


def action_horizon(config: Any) -> int:
    """Number of actions in a chunk."""
    return open_checkpoint(address(config), config=_sizes(config)).config.require("action_horizon")


def _sizes(config: Any) -> str | None:
    return None if config.pretrained_path is not None else config.model_config


def _arguments(config: Any) -> dict[str, Any]:
    """Arguments that complement the checkpoint; none for a saved policy, which is complete."""
    if config.pretrained_path is not None:
        return {}
    return {name: getattr(config, name) for name in ("embodiment", "asset_id", "tokenizer", "default_prompt")}


def load_to_act(config: Any) -> Policy:
    """Load the policy for inference, by default in the device's fastest dtype."""
    arguments = _arguments(config)
    if arguments and config.norm_stats == "dataset":
        raise PluginError("norm_stats is dataset, but there is no training dataset; leave it out, or pass a file.")
    if arguments and config.norm_stats != "checkpoint":
        arguments["norm_stats"] = config.norm_stats
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    return torchpi.load_policy(
        address(config), config=_sizes(config), **arguments, device=config.device, dtype=dtype, engine="eager"
    )


def open_to_train(config: Any, meta: Any) -> Policy:
    """Load the policy in float32 for training, with untrained parameters frozen.

    Args:
        meta: LeRobot's metadata of the dataset.

    Raises:
        ValueError: the dataset's rate, names or units differ from the robot's.
    """
    checkpoint = open_checkpoint(address(config), config=_sizes(config))
    checkpoint.require_full_precision("trained")
    spec, arguments = checkpoint.spec(), _arguments(config)
    stated = arguments.get("embodiment")
    robot = spec.embodiment if stated is None else get_embodiment(stated)
    if robot is None:
        raise MissingKeyError(
            f"{checkpoint.address} does not say which robot it is for: --policy.embodiment=NAME or FILE; torchpi data "
            f"draft {meta.root} --out robot.json describes the dataset's."
        )
    if robot.control_hz is None:
        robot = arguments["embodiment"] = dataclasses.replace(robot, control_hz=meta.fps)
    horizon = checkpoint.config.require("action_horizon")
    dataset = _checked_dataset(meta, robot, horizon)
    with contextlib.ExitStack() as stack:
        if arguments and _takes_dataset_stats(config, checkpoint):
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stats = compute_norm_stats(dataset, robot, action_horizon=horizon)
            save_norm_stats(folder / "norm_stats.json", stats)
            arguments["norm_stats"] = folder
        elif arguments and config.norm_stats != "checkpoint":
            arguments["norm_stats"] = config.norm_stats
        spec = spec.requested(**arguments)
    model = checkpoint.model(device=torch.device(config.device), dtype=torch.float32)
    model.trained_action_dim = max(model.trained_action_dim, robot.action_size)
    provenance = {"source": "lerobot-train", "init": checkpoint.address, "dataset": meta.repo_id}
    spec = dataclasses.replace(spec, provenance=provenance)
    policy = policy_of(model, spec.with_tokenizer(model.config.vocab_size))
    for name, trained in trainable_parameters(model, config.finetune).items():
        model.get_parameter(name).requires_grad_(trained)
    checkpoint_activations(model, config.activation_checkpointing)
    fast = has_bfloat16(model.device) if config.dtype is None else config.dtype == "bfloat16"
    model.compute_dtype_override = torch.bfloat16 if fast else torch.float32
    return policy


def _takes_dataset_stats(config: Any, checkpoint: Checkpoint) -> bool:
    """True if the dataset's statistics are used, see `TorchpiConfig.norm_stats`."""
    if config.norm_stats is not None or config.asset_id is not None:
        return config.norm_stats == "dataset"
    return checkpoint.spec().norm_stats is None or config.embodiment is not None


def _checked_dataset(meta: Any, robot: Embodiment, horizon: int) -> LeRobotDataset:
    """Open the dataset with torchpi and compare its rate, names and units with the robot's.

    LeRobot passes frames on unchanged, so dimensions in another order are an error.
    """
    if robot.control_hz is not None and not same_rate(robot.control_hz, meta.fps):
        raise PluginError(
            f"{meta.root} has {meta.fps:g} frames per second, and '{robot.name}' acts at {robot.control_hz:g} Hz; "
            "resample the dataset (torchpi data resample), or correct control_hz of the embodiment."
        )
    # LeRobot downloads only the files of the chosen episodes.
    available = [i for i in range(meta.total_episodes) if (meta.root / meta.get_data_file_path(i)).is_file()]
    dataset = LeRobotDataset(meta.root, action_horizon=horizon, episodes=available, cameras=())
    names = {STATE: dataset.state_names, ACTION: dataset.action_names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*They are put into that order")  # not here
        order = in_robot_order(robot, dataset.columns, names, dataset.path)
    for key, indices in order.items():
        if indices != sorted(indices):
            raise PluginError(
                f"{meta.root}: {key} has {', '.join(names[key] or ())}, another order than '{robot.name}', and LeRobot "
                "passes them on unchanged. List the dimensions in the dataset's order in the embodiment."
            )
    if problems := unit_problems(dataset, robot):
        raise PluginError(problems[0])
    return dataset
