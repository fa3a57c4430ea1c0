"""The policy that is evaluated, in this process or behind a websocket, and whether it fits an environment."""

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
"""An environment with more tasks than this is evaluated in those that are named, not in all of them."""


def is_address(policy: Any) -> bool:
    """True for the address of a server, not a path."""
    return isinstance(policy, str) and policy.startswith(("ws://", "wss://"))


class RemotePolicy:
    """Infers like a `Policy`, on a server; the noise and the number of Euler steps are the server's."""

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
            found = "asks for a token, but none was given" if token is None else "does not accept the token"
            raise ConnectionError(
                f"{address} {found} (HTTP 401); expected the one that its server was started with: give it as --token, "
                "as TORCHPI_TOKEN in the environment, or in Python as token=."
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
    """The policy at a path, with more arguments for `load_policy`; at a server's address, until the block ends; or the
    object itself."""
    check_opening(policy, load, token)
    if is_address(policy):
        with contextlib.closing(RemotePolicy(str(policy), token=token)) as actor:
            yield actor
    else:
        yield load_policy(policy, **load) if isinstance(policy, str | pathlib.Path) else policy


def check_opening(policy: str | pathlib.Path | Actor, load: Mapping[str, Any], token: str | None) -> None:
    """Raise an error for a token, or arguments of `load_policy`, that a policy has no use for."""
    is_path = isinstance(policy, str | pathlib.Path)
    if token is not None and not is_address(policy):
        found = f"{policy} is none" if is_path else "this policy is loaded already"
        raise SimulationError(
            f"A token is for the address of a server, ws://HOST:PORT, and {found}; leave the token out."
        )
    if load and (is_address(policy) or not is_path):
        loaded = "This policy's server loads it" if is_address(policy) else "This policy is loaded already"
        raise SimulationError(f"{loaded}; it takes no {', '.join(load)}.")


def noise_shape(actor: Actor, num_samples: int | None = None) -> tuple[int, ...] | None:
    """[H, action_dim], or [N, H, action_dim]; None: its noise can't be given."""
    if not isinstance(actor, Policy):
        return None
    return (*(() if num_samples is None else (num_samples,)), *actor.model.config.chunk_shape)


def fingerprint(actor: Actor) -> str:
    """That of a policy; of a served one, a hash of what its server says, to which torchpi's adds the fingerprint."""
    if isinstance(actor, RemotePolicy):
        stated = {name: value for name, value in actor.metadata.items() if name != "engine"}  # warms up while it serves
        return hashlib.sha256(json.dumps(stated, sort_keys=True, default=repr).encode()).hexdigest()
    return actor.fingerprint() if isinstance(actor, Policy) else type(actor).__name__


def provenance_of(actor: Actor) -> Mapping[str, Any]:
    """Statements of a policy about its training."""
    return actor.metadata if isinstance(actor, RemotePolicy) else getattr(actor, "provenance", {})


def chosen_tasks(provenance: Mapping[str, Any], env: str, tasks: Sequence[str] | None) -> list[str]:
    """The tasks to evaluate: those that are named, or those of the policy's training, or all if they are few."""
    known = tasks_of(env)
    if tasks is None and simulator(env).protocol.initial_states:
        tasks = known
    if tasks is None:
        trained = list(provenance.get("tasks") or ())
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
    """The rollout with the policy's recommendation where nothing else is asked for; an error if they do not fit."""
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
    """Raise an error for settings that are a server's."""
    if rollout.num_steps is not None:
        raise SimulationError("The number of Euler steps of a served policy is its server's; leave num_steps out.")
    if rollout.num_samples is not None:
        raise SimulationError(
            "The number of samples of a served policy is its server's, serve --num-samples; leave it out here."
        )


def fitting_rollout(env: str, rollout: Rollout, recommended: int | None, horizon: int | None) -> Rollout:
    """The rollout with the number of actions to execute that the environment or else the policy recommends, where none
    is asked for; an error if a chunk has fewer."""
    protocol = simulator(env).protocol.execute_steps
    execute_steps = rollout.execute_steps or protocol or recommended
    if execute_steps and horizon and execute_steps > horizon:
        source = f"{env} executes" if protocol else "The policy recommends to execute"
        source = "execute_steps is" if rollout.execute_steps else source
        raise SimulationError(
            f"{source} {execute_steps}, but its chunk has only {horizon} actions; choose --execute-steps up to that."
        )
    return dataclasses.replace(rollout, execute_steps=execute_steps)


def check_embodiment(policy: Embodiment, robot: Embodiment) -> None:
    """Raise an error unless the environment sends what the policy reads, and takes what it returns."""
    sides = f"The policy's embodiment {policy.name!r} and the environment's {robot.name!r} do not fit: "
    sent = {camera.key: camera.layout for camera in robot.cameras if camera.key}
    required = [camera.key for camera in policy.read_cameras if camera.presence == "required" and camera.key]
    if not set(required) <= set(sent):
        raise SimulationError(
            f"{sides}the policy requires the cameras {', '.join(required)}, the environment has {', '.join(sent)}."
        )
    for camera in policy.read_cameras:
        if camera.key and camera.layout != sent.get(camera.key, camera.layout):
            raise SimulationError(
                f"{sides}the policy reads camera {camera.key} as {camera.layout}, the environment sends "
                f"{sent[camera.key]}."
            )
    keys, sent_keys = ([part.key for part in side.state] for side in (policy, robot))
    if keys and (keys != sent_keys or len(robot.state_names) not in policy.state_dims):
        lengths = listed(policy.state_dims, "or")
        raise SimulationError(
            f"{sides}the policy reads a state of {lengths} numbers in {', '.join(keys)}, the environment sends "
            f"{len(robot.state_names)} ({', '.join(robot.state_names)}) in {', '.join(sent_keys)}."
        )
    stated = {"action_names": policy.action_names, "action_units": policy.action_units, "control_hz": policy.control_hz}
    _check_actions(stated | {"action_commands": [action.command for action in policy.actions]}, robot, sides)
    if keys:
        _check_dimensions("state", policy.state_names, policy.state_units, robot.state_names, robot.state_units, sides)


_COMPARED = {*COMMANDS, "deg", "rad", "-100 to 100 of the calibrated range"}
"""Other units are said in words, in which the same can be said otherwise."""


def check_metadata(metadata: Mapping[str, Any], robot: Embodiment) -> None:
    """`check_embodiment` for a served policy, as far as its metadata say something about actions and rate."""
    name = metadata.get("embodiment", "no name")
    _check_actions(metadata, robot, f"The served policy ({name}) and the environment {robot.name!r} do not fit: ")


def _check_actions(stated: Mapping[str, Any], robot: Embodiment, sides: str) -> None:
    names, control_hz, own = stated.get("action_names"), stated.get("control_hz"), robot.action_names
    if names is not None and len(names) != len(own):
        raise SimulationError(
            f"{sides}the policy's actions have {len(names)} dimensions ({', '.join(names)}), the environment takes "
            f"{len(own)} ({', '.join(own)})."
        )
    if names is not None:
        commands = [action.command for action in robot.actions]
        _check_dimensions("actions", names, stated.get("action_commands") or (), own, commands, sides)
        _check_dimensions("actions", names, stated.get("action_units") or (), own, robot.action_units, sides)
    if control_hz is not None and robot.control_hz is not None and control_hz != robot.control_hz:
        raise SimulationError(
            f"{sides}the policy acts at {control_hz:g} Hz, the environment at {robot.control_hz:g} Hz, so that its "
            "actions would be executed too fast or too slowly."
        )


def _check_dimensions(
    what: str,
    names: Sequence[str],
    meanings: Sequence[str | None],
    own_names: Sequence[str],
    own_meanings: Sequence[str | None],
    sides: str,
) -> None:
    """Raise an error for the environment's dimensions in another order, or with another command or joint's unit where
    both state one; the names of robots' descriptions differ."""
    if sorted(names) == sorted(own_names) and list(names) != list(own_names):
        order, own_order = ", ".join(names), ", ".join(own_names)
        raise SimulationError(f"{sides}the policy's {what} are in the order {order}, the environment's {own_order}.")
    for name, meaning, own in zip(names, meanings, own_meanings, strict=False):
        if meaning and own and meaning != own and {meaning, own} <= _COMPARED:
            raise SimulationError(f"{sides}{name} of the policy's {what} is {meaning!r}, of the environment's {own!r}.")
