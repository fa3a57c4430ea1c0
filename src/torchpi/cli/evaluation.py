"""The eval command."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from torchpi.atomic import replace_text
from torchpi.cli.common import EpisodeOptions, Json, Load, SamplingOptions, refuse_changed, split_names
from torchpi.errors import UsageError
from torchpi.samples import PickName
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class SimulationOptions:
    """Options for --env."""

    suite: str | None = None
    """With --env libero: task suite: spatial, object, goal, 10 or 90. Its tasks are named 0, 1, …"""
    protocol: str | None = None
    """With --env libero: evaluation protocol, openpi (default) or lerobot.
    lerobot: 280 steps in spatial, 10 episodes, another seed, 256-pixel images, the policy's own execute_steps."""
    tasks: str | None = None
    """With --env: task names, separated by commas; by default the policy's training tasks, in LIBERO all tasks."""
    episodes: int | None = None
    """With --env: episodes per task; by default 20, or in LIBERO one for each of the 50 initial states."""
    workers: int | None = None
    """With --env: number of simulator processes; by default limited by CPU cores and memory, and one on a GPU."""
    execute_steps: int | None = None
    """With --env: actions to execute of each chunk; by default as the policy recommends or half, in LIBERO 5."""
    num_samples: int | None = None
    """With --env: number of chunks to sample each time, of which one is executed; by default 1."""
    pick: PickName | None = None
    """With --env and --num-samples: how to select the chunk, see torchpi infer --help."""
    max_steps: int | None = None
    """With --env: number of actions after which an episode counts as failed; by default the simulator's limit."""
    swap: str | None = None
    """With --env: swap the instructions of two tasks, as faucet-open:faucet-close; separate pairs by commas.
    A policy that follows its instruction then fails the task."""
    blank_images: bool = False
    """With --env: replace the camera images by black ones."""
    videos: int = 0
    """With --env: number of episodes per task to save as video."""
    token: str | None = None
    """With --env: access token of the policy server; by default the environment variable TORCHPI_TOKEN."""


@dataclasses.dataclass(frozen=True)
class DatasetOptions(EpisodeOptions):
    """Options for --dataset."""

    samples: int = 256
    """With --dataset: number of frames to evaluate, spread evenly over the episodes and within each."""
    batch_size: int = 32
    """With --dataset: number of chunks to predict at once; affects only speed and memory."""


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a policy in a simulator or on recorded episodes.

    In a simulator (--env), it runs episodes and counts successes. Rendering needs no display. Seed, task and episode
    number determine each episode; the number of workers does not change the result.

    On a LeRobot dataset (--dataset), it predicts action chunks for sampled frames. They are compared, in the robot's
    units, with the recorded actions and with two baselines: staying still, and the dataset's mean action.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """Policy folder, checkpoint, "demo", or, with --env, the address of a policy server (ws://HOST:PORT)."""
    env: str | None = None
    """Simulator: metaworld, so101, aloha_sim, robosuite, or libero with --suite."""
    dataset: str | None = None
    """LeRobot dataset of the policy's robot: a folder, or hf://org/name."""
    seed: int | None = None
    """Random seed for episodes, frames and noise; by default 0, in LIBERO 7.
    Whatever the seed, no episode coincides with one of `sim record`."""
    num_steps: int | None = None
    """Number of Euler steps from noise to actions; by default the policy's setting, or 10 if it has none."""
    out: pathlib.Path | None = None
    """Output folder for plots of errors and chunks, or for simulated episodes, videos and a page.
    After an interruption, the same command continues a simulation. By default nothing is saved."""
    dry_run: bool = False
    """Check policy, tasks and options, and print what would run, without downloading, loading or simulating."""
    json: Json = False
    simulation: Annotated[SimulationOptions, tyro.conf.arg(name="")] = SimulationOptions()
    recorded: Annotated[DatasetOptions, tyro.conf.arg(name="")] = DatasetOptions()
    load: Load = SamplingOptions()

    def run(self) -> None:
        if (self.env is None) == (self.dataset is None):
            raise UsageError("eval needs either --env (a simulator) or --dataset (recorded episodes).")
        if self.dataset is None:
            refuse_changed(self.recorded, belongs_to="--dataset")
            self._simulate()
        else:
            refuse_changed(self.simulation, belongs_to="--env")
            self._predict(self.dataset)

    def _print_plan(self, plan: Mapping[str, Any]) -> None:
        if self.json:
            print_json(plan)
            return
        for name, value in plan.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"{name}: {'unknown until the policy is downloaded' if text is None else text}")

    def _predict(self, dataset: str) -> None:
        from torchpi.evaluation.report import run_dataset_evaluation

        if self.dry_run:
            from torchpi.cli.dry_run import plan_dataset

            self._print_plan(plan_dataset(self.policy, dataset, self.recorded, self.load.given()))
            return
        run_dataset_evaluation(
            self.policy,
            dataset,
            samples=self.recorded.samples,
            seed=self.seed or 0,
            num_steps=self.num_steps,
            batch_size=self.recorded.batch_size,
            out=self.out,
            load=self.load.given(),
            as_json=self.json,
            **self.recorded.episode_args(dataset),
        )

    def _simulate(self) -> None:
        assert self.env is not None
        from torchpi.sim import environment_name, swapped_instructions
        from torchpi.sim.actors import is_address
        from torchpi.sim.evaluate import evaluate
        from torchpi.sim.page import render_evaluation
        from torchpi.sim.result import print_evaluation
        from torchpi.sim.rollout import Rollout

        options = self.simulation
        env = environment_name(self.env, options.suite, options.protocol)
        tasks = None if options.tasks is None else split_names(options.tasks)
        rollout = Rollout(
            options.execute_steps,
            self.num_steps,
            options.max_steps,
            blank_images=options.blank_images,
            num_samples=options.num_samples,
            pick=options.pick,
        )
        instructions = swapped_instructions(env, split_names(options.swap or ""))
        if self.dry_run:
            from torchpi.cli.dry_run import plan_simulation

            self._print_plan(plan_simulation(self, env, tasks, rollout, instructions))
            return
        # TORCHPI_TOKEN may be set for a server in the same shell. Without a server address, only --token is an error.
        token = options.token
        if token is None and is_address(self.policy):
            token = os.environ.get("TORCHPI_TOKEN")
        result = evaluate(
            self.policy,
            env,
            tasks=tasks,
            episodes=options.episodes,
            seed=self.seed,
            rollout=rollout,
            instructions=instructions,
            workers=options.workers,
            videos=options.videos,
            out=self.out,
            resume=self.out is not None,
            load=self.load.given(),
            token=token,
        )
        if self.json:
            print_json(result.to_dict())
        else:
            print_evaluation(result)
        if self.out is not None:
            replace_text(self.out / "index.html", render_evaluation(result, self.out))
            if not self.json:
                print(f"page: {self.out / 'index.html'}")
