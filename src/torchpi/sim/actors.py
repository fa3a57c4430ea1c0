"""The policy to evaluate, in this process or on a server, and checks that it fits an environment."""

import contextlib
import dataclasses
import hashlib
import http
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchpi.errors import SimulationError, listed
from torchpi.extras import require
from torchpi.policy import Policy, load_policy
from torchpi.robots import Embodiment
from torchpi.robots.parts import COMMANDS
from torchpi.sim import check_tasks, simulator, tasks_of
from torchpi.sim.rollout import Actor, Rollout

MANY_TASKS = 10
"""An environment with more tasks than this is not evaluated in all of them by default."""
_COMPARED = {*COMMANDS, "deg", "rad", "-100 to 100 of the calibrated range"}
"""Commands and units that are compared between robots; other units are free text, with several spellings for one."""


def is_address(policy: Any) -> bool:
    """True for a server's address, False for a path."""
    return isinstance(policy, str) and policy.startswith(("ws://", "wss://"))


class RemotePolicy:
    """Client for a served policy, with the `infer` of a `Policy`; the server decides the noise and the Euler steps."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        client = require("torchpi_client", "client")
        self._server_error = client.ServerError
        try:
            self._client = client.WebsocketPolicy(address, api_key=token)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error
        except ConnectionError as error:
            response = getattr(error.__cause__, "response", None)
            if getattr(response, "status_code", None) != http.HTTPStatus.UNAUTHORIZED:
                raise
            found = "requires a token, but none was given" if token is None else "does not accept the token"
            raise ConnectionError(
                f"{address} {found} (HTTP 401); expected the token that the server was started with: pass it as "
                "--token, as TORCHPI_TOKEN in the environment, or in Python as token=."
            ) from error
        self.metadata: dict[str, Any] = self._client.metadata

    def infer(self, observation: dict[str, Any]) -> Mapping[str, Any]:
        try:
            return self._client.infer(observation)
        except self._server_error as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def opened(policy: str | pathlib.Path | Actor, load: Mapping[str, Any], token: str | None) -> Iterator[Actor]:
    """Load a policy by `load_policy(path, **load)`, connect to a server until the block ends, or pass on an object."""
    check_opening(policy, load, token)
    if is_address(policy):
        with contextlib.closing(RemotePolicy(str(policy), token=token)) as actor:
            yield actor
    else:
        yield load_policy(policy, **load) if isinstance(policy, str | pathlib.Path) else policy


def check_opening(policy: str | pathlib.Path | Actor, load: Mapping[str, Any], token: str | None) -> None:
    """Raise an error for a token, or arguments of `load_policy`, that do not apply to the policy."""
    is_path = isinstance(policy, str | pathlib.Path)
    if token is not None and not is_address(policy):
        found = f"{policy} is not one" if is_path else "this policy is loaded already"
        raise SimulationError(f"A token is for the address of a server, ws://HOST:PORT, and {found}; leave it out.")
    if load and (is_address(policy) or not is_path):
        loaded = "This policy's server loads it" if is_address(policy) else "This policy is loaded already"
        raise SimulationError(f"{loaded}; it takes no {', '.join(load)}.")


def noise_shape(actor: Actor, num_samples: int | None = None) -> tuple[int, ...] | None:
    """Shape of the initial noise, [H, action_dim] or [R, H, action_dim]; None if the policy takes no noise."""
    if not isinstance(actor, Policy):
        return None
    samples = () if num_samples is None else (num_samples,)
    return (*samples, *actor.model.config.chunk_shape)


def fingerprint(actor: Actor) -> str:
    """Hash that identifies a policy; for a served one of its metadata, which include torchpi's own fingerprint."""
    if isinstance(actor, RemotePolicy):
        # The engine warms up, and changes its entry, while it serves.
        metadata = {name: value for name, value in actor.metadata.items() if name != "engine"}
        return hashlib.sha256(json.dumps(metadata, sort_keys=True, default=repr).encode()).hexdigest()
    return actor.fingerprint() if isinstance(actor, Policy) else type(actor).__name__


def provenance_of(actor: Actor) -> Mapping[str, Any]:
    """A policy's statements about its training."""
    return actor.metadata if isinstance(actor, RemotePolicy) else getattr(actor, "provenance", {})


def chosen_tasks(provenance: Mapping[str, Any], env: str, tasks: Sequence[str] | None) -> list[str]:
    """The tasks to evaluate: the given ones, else those that the policy was trained on, else all if they are few.

    A benchmark with initial states is evaluated in all tasks by default.
    """
    known = tasks_of(env)
    if tasks is None and simulator(env).protocol.initial_states:
        tasks = known
    if tasks is None:
        trained = list(provenance.get("tasks") or ())
        tasks = trained if set(trained) <= set(known) else []
        if not tasks and len(known) > MANY_TASKS:
            raise SimulationError(
                f"The policy does not say on which tasks of {env} it was trained; name the tasks to evaluate "
                f"(--tasks): {', '.join(known)}."
            )
        tasks = tasks or known
    check_tasks(env, tasks)
    return list(tasks)


def checked_rollout(actor: Actor, env: str, rollout: Rollout) -> Rollout:
    """Check that a policy fits an environment, and complete the rollout with the recommended settings."""
    robot = simulator(env).embodiment
    recommended = horizon = None
    if isinstance(actor, RemotePolicy):
        check_served(rollout)
        check_metadata(actor.metadata, robot)
        recommended, horizon = actor.metadata.get("execute_steps"), actor.metadata.get("action_horizon")
    elif isinstance(actor, Policy):
        check_embodiment(actor.embodiment, robot)
        recommended, horizon = actor.embodiment.execute_steps, actor.model.config.require("action_horizon")
    return fitting_rollout(env, rollout, recommended, horizon)


def check_served(rollout: Rollout) -> None:
    """Raise an error for settings that only the server can set."""
    if rollout.num_steps is not None:
        raise SimulationError("The server of a policy sets its number of Euler steps; leave num_steps out.")
    if rollout.num_samples is not None:
        raise SimulationError(
            "The server of a policy sets its number of samples (serve --num-samples); leave num_samples out."
        )


def fitting_rollout(env: str, rollout: Rollout, recommended: int | None, horizon: int | None) -> Rollout:
    """Set execute_steps, if the rollout doesn't, to the environment's protocol or else the policy's recommendation.

    A ValueError if a chunk has fewer actions.
    """
    protocol = simulator(env).protocol.execute_steps
    execute_steps = rollout.execute_steps or protocol or recommended
    if execute_steps and horizon and execute_steps > horizon:
        if rollout.execute_steps:
            source = "execute_steps is"
        else:
            source = f"{env} executes" if protocol else "The policy recommends executing"
        raise SimulationError(
            f"{source} {execute_steps}, but its chunk has only {horizon} actions; choose --execute-steps up to that."
        )
    return dataclasses.replace(rollout, execute_steps=execute_steps)


def check_embodiment(policy: Embodiment, robot: Embodiment) -> None:
    """Raise an error unless the environment's robot sends what the policy reads and takes the actions it returns."""
    mismatch = f"The policy's embodiment {policy.name!r} and the environment's {robot.name!r} do not fit: "
    sent = {camera.key: camera.layout for camera in robot.cameras if camera.key}
    required = [camera.key for camera in policy.read_cameras if camera.presence == "required" and camera.key]
    if not set(required) <= set(sent):
        raise SimulationError(
            f"{mismatch}the policy requires the cameras {', '.join(required)}, the environment has {', '.join(sent)}."
        )
    for camera in policy.read_cameras:
        if camera.key and camera.layout != sent.get(camera.key, camera.layout):
            raise SimulationError(
                f"{mismatch}the policy reads camera {camera.key} as {camera.layout}, the environment sends "
                f"{sent[camera.key]}."
            )
    keys, robot_keys = ([part.key for part in embodiment.state] for embodiment in (policy, robot))
    if keys and (keys != robot_keys or len(robot.state_names) not in policy.state_dims):
        sizes = listed(policy.state_dims, "or")
        raise SimulationError(
            f"{mismatch}the policy reads a state of {sizes} numbers in {', '.join(keys)}, the environment sends "
            f"{len(robot.state_names)} ({', '.join(robot.state_names)}) in {', '.join(robot_keys)}."
        )
    policy_actions = {
        "action_names": policy.action_names,
        "action_units": policy.action_units,
        "action_commands": [action.command for action in policy.actions],
        "control_hz": policy.control_hz,
    }
    _check_actions(policy_actions, robot, mismatch)
    if keys:
        _check_order("state", policy.state_names, robot.state_names, mismatch)
        _check_meanings("state", policy.state_names, policy.state_units, robot.state_units, mismatch)


def check_metadata(metadata: Mapping[str, Any], robot: Embodiment) -> None:
    """`check_embodiment` for a served policy, as far as its metadata describe its actions and control rate."""
    name = metadata.get("embodiment", "no name")
    _check_actions(metadata, robot, f"The served policy ({name}) and the environment {robot.name!r} do not fit: ")


def _check_actions(policy: Mapping[str, Any], robot: Embodiment, mismatch: str) -> None:
    names, control_hz = policy.get("action_names"), policy.get("control_hz")
    if names is not None:
        if len(names) != len(robot.action_names):
            raise SimulationError(
                f"{mismatch}the policy's actions have {len(names)} dimensions ({', '.join(names)}), the environment "
                f"takes {len(robot.action_names)} ({', '.join(robot.action_names)})."
            )
        _check_order("actions", names, robot.action_names, mismatch)
        commands = [action.command for action in robot.actions]
        _check_meanings("actions", names, policy.get("action_commands") or (), commands, mismatch)
        _check_meanings("actions", names, policy.get("action_units") or (), robot.action_units, mismatch)
    if control_hz is not None and robot.control_hz is not None and control_hz != robot.control_hz:
        raise SimulationError(
            f"{mismatch}the policy acts at {control_hz:g} Hz, the environment at {robot.control_hz:g} Hz, so that its "
            "actions would be executed too fast or too slowly."
        )


def _check_order(what: str, names: Sequence[str], robot_names: Sequence[str], mismatch: str) -> None:
    """Raise an error if both have the same dimensions in another order; other names may mean the same dimensions."""
    if sorted(names) == sorted(robot_names) and list(names) != list(robot_names):
        order, robot_order = ", ".join(names), ", ".join(robot_names)
        raise SimulationError(
            f"{mismatch}the policy's {what} are in the order {order}, the environment's {robot_order}."
        )


def _check_meanings(
    what: str, names: Sequence[str], policy: Sequence[str | None], robot: Sequence[str | None], mismatch: str
) -> None:
    """Raise an error where both state the command or unit of a dimension, and they differ."""
    for name, ours, theirs in zip(names, policy, robot, strict=False):
        if ours and theirs and ours != theirs and {ours, theirs} <= _COMPARED:
            raise SimulationError(
                f"{mismatch}{name} of the policy's {what} is {ours!r}, of the environment's {theirs!r}."
            )
