"""`torchpi eval --dry-run`: check the options and report the evaluation's size, without downloads or simulation."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.checkpoints.address import REMOTE, published_name
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.hub import dataset_source, source_of
from torchpi.checkpoints.sizes import read_config
from torchpi.config import Pi0Config
from torchpi.errors import MissingFileError
from torchpi.model.pi0 import Pi0
from torchpi.robots import EMBODIMENTS, Embodiment, get_embodiment
from torchpi.ui.format import format_gib, large_count


def _inspect_policy(
    policy: str, load: Mapping[str, Any]
) -> tuple[Embodiment | None, Pi0Config | None, Mapping[str, Any]]:
    """Embodiment, config and provenance of a policy, as far as they are known without a download.

    A local policy is read from its files; a remote one is known by its published name or the options.
    """
    robot, config = load.get("embodiment"), load.get("config")
    if not policy.startswith(REMOTE):
        checkpoint = open_checkpoint(policy, config=config)
        spec = checkpoint.spec()
        return get_embodiment(robot) if robot else spec.embodiment, checkpoint.config, spec.provenance
    source_of(policy)  # raises an error if the address is malformed
    name = published_name(policy)
    robot, config = robot or (name if name in EMBODIMENTS else None), config or name
    sizes = None if config is None else read_config(config)
    return get_embodiment(robot) if robot else None, sizes if isinstance(sizes, Pi0Config) else None, {}


def _policy_summary(policy: str, robot: Embodiment | None, config: Pi0Config | None) -> dict[str, Any]:
    count = config and sum(parameter.numel() for parameter in Pi0(config, device="meta").parameters())
    return {
        "policy": policy,
        "embodiment": robot and robot.name,
        "parameters": count and large_count(count),
        "weights": count and f"{format_gib(2 * count)} in bfloat16, {format_gib(4 * count)} in float32",
    }


def plan_simulation(
    command: Any, env: str, tasks: Sequence[str] | None, rollout: Any, instructions: Mapping[str, str]
) -> dict[str, Any]:
    """Plan of a simulated evaluation. Raises the errors of `eval`, as far as the policy is known."""
    from torchpi.sim import actors, evaluate, simulator

    options, sim, load = command.simulation, simulator(env), command.load.given()
    actors.check_opening(command.policy, load, options.token)
    if is_served := actors.is_address(command.policy):
        actors.check_served(rollout)
    robot, config, provenance = (None, None, {}) if is_served else _inspect_policy(command.policy, load)
    if robot is not None:
        actors.check_embodiment(robot, sim.embodiment)
    horizon = None if config is None else config.require("action_horizon")
    rollout = actors.fitting_rollout(env, rollout, None if robot is None else robot.execute_steps, horizon)
    tasks = actors.chosen_tasks(provenance, env, tasks)
    evaluate.check_instructions(instructions, tasks)
    episodes = sim.protocol.episodes if options.episodes is None else options.episodes
    evaluate.check_numbers(env, episodes, options.videos, command.seed or 0, options.workers)
    evaluate.check_folder(options.videos, False, command.out)
    num_actions = len(tasks) * episodes * (rollout.max_steps or sim.max_steps)
    execute_steps = rollout.execute_steps or (horizon and max(1, horizon // 2))
    return {
        **_policy_summary(command.policy, robot, config),
        "environment": env,
        "tasks": list(tasks),
        "episodes": len(tasks) * episodes,
        "actions, at most": num_actions,
        "chunks, at most": execute_steps and -(-num_actions // execute_steps),
        "memory of a simulator": format_gib(sim.memory_bytes),
    }


def plan_dataset(policy: str, dataset: str, options: Any, load: Mapping[str, Any]) -> dict[str, Any]:
    """Plan of an evaluation on recorded episodes. For a dataset on the Hub, only the address is checked."""
    options.dataset_args()  # raises an error for malformed options
    if dataset.startswith("hf://"):
        dataset_source(dataset, {"meta/"})
    elif not pathlib.Path(dataset).expanduser().is_dir():
        raise MissingFileError(f"There is no dataset at {dataset}; expected a folder, or hf://org/name.")
    robot, config, _ = _inspect_policy(policy, load)
    return {**_policy_summary(policy, robot, config), "dataset": dataset, "chunks, at most": options.samples}
