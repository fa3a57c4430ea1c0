"""The command eval."""

import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from torchpi.cli.common import Checkpoint, CheckpointOptions, print_json, split_names
from torchpi.errors import UsageError


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    env: str | None = None,
    dataset: str | None = None,
    tasks: str | None = None,
    episodes: int = 20,
    select: str | None = None,
    rename: tuple[str, ...] = (),
    samples: int = 256,
    seed: int = 0,
    workers: int | None = None,
    batch_size: int = 32,
    num_steps: int | None = None,
    execute_steps: int | None = None,
    max_steps: int | None = None,
    swap: str | None = None,
    blank_images: bool = False,
    videos: int = 0,
    out: pathlib.Path | None = None,
    device: str | None = None,
    token: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Judge a policy: in a simulator (--env), or on recorded episodes (--dataset).

    In a simulator it runs episodes, whose successes are counted. The cameras are rendered without a screen. Seed, task
    and the episode's number decide an episode; the number of workers changes nothing.

    On a LeRobot data set it predicts the chunks of sampled frames, which are compared with the recorded actions in the
    robot's units, beside two baselines: the robot stays where it is, and the data set's mean action.

    Args:
        policy: a policy folder, a checkpoint, "demo", or, with --env, the address of a server (ws://HOST:PORT).
        env: metaworld or aloha_sim.
        dataset: a LeRobot data set of the policy's robot, a folder or hf://org/name.
        tasks: with --env: by name, separated by commas; by default those that the policy was trained on.
        episodes: with --env: per task.
        select: with --dataset: only these episodes, for example "0:40,57,100:" or "task:open the *"; both: "0:40;
            task:open the *".
        rename: with --dataset: LeRobot's names of columns and cameras where the set has others, OLD=NEW:
            state=observation.state actions=action. Columns that have to be joined:
            joint_position+gripper_position=observation.state.
        samples: with --dataset: frames, spread evenly over the episodes and the time in each.
        seed: of episodes, frames and noise; no seed has episodes that `sim record` records.
        workers: with --env: processes; by default as many as the CPU's cores and the memory allow, and one on a GPU.
        batch_size: with --dataset: chunks that are predicted at once; changes nothing but time and memory.
        num_steps: Euler steps from noise to actions; by default 10.
        execute_steps: with --env: actions of each chunk to execute; by default what the policy recommends, or half of
            the chunk.
        max_steps: with --env: actions after which an episode has failed; by default the simulator's.
        swap: with --env: two tasks that get each other's instruction, for example faucet-open:faucet-close; several
            such pairs are separated by commas. A policy that reads its instruction then does the wrong thing.
        blank_images: with --env: show the policy black images.
        videos: with --env: film the first so many episodes of each task.
        out: the folder of the videos, or of the pictures of errors and chunks; by default nothing is drawn.
        device: for example cuda or cpu; by default cuda where there is one.
        token: of a server: what it asks for; by default TORCHPI_TOKEN of the environment.
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    load = checkpoint.given() | ({} if device is None else {"device": device})
    simulated = {
        "tasks": tasks, "episodes": episodes, "workers": workers, "execute_steps": execute_steps,
        "max_steps": max_steps, "swap": swap, "blank_images": blank_images, "videos": videos, "token": token,
    }  # fmt: skip
    if (env is None) == (dataset is None):
        raise UsageError("eval needs either --env, a simulator, or --dataset, recorded episodes.")
    if dataset is not None:
        _refuse_changed(evaluate, simulated, belongs_to="--env")
        from torchpi.data import select_episodes
        from torchpi.data.rename import parse_rename
        from torchpi.evaluation.report import run_dataset_evaluation

        chosen = None if select is None else select_episodes(dataset, select)
        steps = 10 if num_steps is None else num_steps
        sampling = {"samples": samples, "seed": seed, "num_steps": steps, "batch_size": batch_size}
        run_dataset_evaluation(
            policy,
            dataset,
            **sampling,
            episodes=chosen,
            rename=parse_rename(rename),
            out=out,
            load=load,
            as_json=json,
        )
        return
    assert env is not None
    recorded = {"select": select, "rename": rename, "samples": samples, "batch_size": batch_size}
    _refuse_changed(evaluate, recorded, belongs_to="--dataset")
    from torchpi.sim.remote import is_address
    from torchpi.sim.report import print_evaluation, swapped_instructions
    from torchpi.sim.rollout import Rollout

    # Last, because it brings torch.
    from torchpi.sim.evaluate import evaluate as run  # isort: skip

    result = run(
        policy,
        env,
        tasks=None if tasks is None else split_names(tasks),
        episodes=episodes,
        seed=seed,
        rollout=Rollout(execute_steps, num_steps, max_steps, blank_images=blank_images),
        instructions=swapped_instructions(env, split_names(swap or "")),
        workers=workers,
        videos=videos,
        out=out,
        load=load,
        # The environment's may be meant for a server that is started from the same shell; only --token is a mistake.
        token=os.environ.get("TORCHPI_TOKEN") if token is None and is_address(policy) else token,
    )
    if json:
        print_json(result.to_dict())
    else:
        print_evaluation(result)


def _refuse_changed(command: Callable[..., Any], options: dict[str, Any], *, belongs_to: str) -> None:
    """Raises a ValueError about options that are not at their default, though they say nothing here."""
    parameters = inspect.signature(command).parameters
    changed = [f"--{name.replace('_', '-')}" for name, value in options.items() if value != parameters[name].default]
    if changed:
        raise UsageError(f"{', '.join(changed)} can only be given with {belongs_to}.")
