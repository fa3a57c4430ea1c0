"""What is evaluated: a policy in this process, or one behind a websocket; and whether it fits an environment."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from torchpi.errors import SimulationError
from torchpi.policy import Policy, load_policy
from torchpi.sim import check_tasks, simulator, tasks_of
from torchpi.sim.compatibility import check_embodiment, check_metadata
from torchpi.sim.remote import RemotePolicy, is_address
from torchpi.sim.rollout import Actor, Rollout

MANY_TASKS = 10
"""An environment with more tasks than this is evaluated in those that are named, not in all of them."""


def open_actor(policy: str | pathlib.Path | Actor, load: Mapping[str, Any], *, token: str | None = None) -> Actor:
    """The policy at a path or an address, or the object itself.

    Args:
        load: more arguments for `load_policy`.
        token: what the server at the address asks for.
    """
    if token is not None and not is_address(policy):
        what = f"{policy} is none" if isinstance(policy, str | pathlib.Path) else "this policy is loaded already"
        raise SimulationError(
            f"A token is for the address of a server, ws://HOST:PORT, and {what}; leave the token out."
        )
    if isinstance(policy, str | pathlib.Path) and not is_address(policy):
        return load_policy(policy, **load)
    if load:
        loaded = "this policy is loaded already" if not isinstance(policy, str) else "this policy's server loads it"
        raise SimulationError(f"{loaded}; it takes no {', '.join(load)}.")
    return RemotePolicy(str(policy), token=token) if is_address(policy) else policy  # type: ignore[return-value]


def close_actor(actor: Actor) -> None:
    """End the connection, where there is one."""
    if isinstance(actor, RemotePolicy):
        actor.close()


def noise_shape(actor: Actor) -> tuple[int, int] | None:
    """[H, action_dim]; None: its noise can't be given."""
    if not isinstance(actor, Policy):
        return None
    config = actor.model.config
    return config.require("action_horizon"), config.action_dim


def chosen_tasks(actor: Actor, env: str, tasks: Sequence[str] | None) -> list[str]:
    """The tasks to evaluate: those that are named, or those of the policy's training, or all if they are few."""
    known = tasks_of(env)
    if tasks is None:
        said = actor.metadata if isinstance(actor, RemotePolicy) else getattr(actor, "provenance", {})
        trained = list(said.get("tasks") or ())
        tasks = trained if set(trained) <= set(known) else []
        if not tasks and len(known) > MANY_TASKS:
            raise SimulationError(
                f"The policy does not say on which tasks of {env} it was trained; name those to evaluate it in "
                f"(--tasks): {', '.join(known)}."
            )
        tasks = tasks or known
    check_tasks(env, tasks)
    return list(tasks)


def checked_rollout(actor: Actor, env: str, rollout: Rollout) -> Rollout:
    """The way to run episodes, with the policy's recommendation where nothing else is asked for."""
    robot = simulator(env).embodiment
    recommended = horizon = None
    if isinstance(actor, RemotePolicy):
        if rollout.num_steps is not None:
            raise SimulationError("The number of Euler steps of a served policy is its server's; leave num_steps out.")
        check_metadata(actor.metadata, robot)
        recommended, horizon = actor.metadata.get("execute_steps"), actor.metadata.get("action_horizon")
    elif isinstance(actor, Policy):
        check_embodiment(actor.embodiment, robot)
        recommended, horizon = actor.embodiment.execute_steps, actor.model.config.require("action_horizon")
    execute_steps = rollout.execute_steps or recommended
    if execute_steps and horizon and execute_steps > horizon:
        source = "execute_steps is" if rollout.execute_steps else "the policy recommends to execute"
        raise SimulationError(
            f"{source} {execute_steps}, but its chunk has only {horizon} actions; choose --execute-steps up to that."
        )
    return dataclasses.replace(rollout, execute_steps=execute_steps)
