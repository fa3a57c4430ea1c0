"""The command eval."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from torchpi.atomic import replace_text
from torchpi.cli.common import EpisodeOptions, Load, SamplingOptions, refuse_changed, split_names
from torchpi.errors import UsageError
from torchpi.samples import PickName
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class SimulationOptions:
    """Options of --env."""

    suite: str | None = None
    """With --env libero: its suite of tasks: spatial, object, goal, 10 or 90. The tasks are called 0, 1, …"""
    protocol: str | None = None
    """With --env libero: the program whose evaluation to repeat, openpi (the default) or lerobot, which has 280 steps
    in spatial, 10 episodes, another seed, images of 256 pixels, and executes what the policy recommends."""
    tasks: str | None = None
    """With --env: tasks by name, separated by commas; by default those of the policy's training, of LIBERO all."""
    episodes: int | None = None
    """With --env: episodes per task, by default 20, and in LIBERO one for each of its 50 initial states."""
    workers: int | None = None
    """With --env: processes; by default as many as the CPU's cores and the memory allow, and one on a GPU."""
    execute_steps: int | None = None
    """With --env: actions of each chunk to execute; by default what the policy recommends, or half of the chunk, and in
    LIBERO 5."""
    num_samples: int | None = None
    """With --env: chunks that are sampled each time, of which one is executed; by default one."""
    pick: PickName | None = None
    """With --env and --num-samples: the choice among them, see torchpi infer --help."""
    max_steps: int | None = None
    """With --env: actions after which an episode has failed; by default the simulator's."""
    swap: str | None = None
    """With --env: two tasks that get each other's instruction, for example faucet-open:faucet-close; several such
    pairs are separated by commas. A policy that reads its instruction then does the wrong thing."""
    blank_images: bool = False
    """With --env: show the policy black images."""
    videos: int = 0
    """With --env: make videos of the first so many episodes of each task."""
    token: str | None = None
    """With --env: the token that a server asks for; by default TORCHPI_TOKEN of the environment."""


@dataclasses.dataclass(frozen=True)
class DatasetOptions(EpisodeOptions):
    """Options of --dataset."""

    samples: int = 256
    """With --dataset: frames, spread evenly over the episodes and the time in each."""
    batch_size: int = 32
    """With --dataset: chunks that are predicted at once; changes nothing but time and memory."""


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a policy: in a simulator (--env), or on recorded episodes (--dataset).

    In a simulator it runs episodes, whose successes are counted. The cameras are rendered without a screen. Seed, task
    and the episode's number decide an episode; the number of workers changes nothing.

    On a LeRobot dataset it predicts the chunks of sampled frames, which are compared with the recorded actions in the
    robot's units and with two baselines: the robot stays where it is, and the dataset's mean action.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder, a checkpoint, "demo", or, with --env, the address of a server (ws://HOST:PORT)."""
    env: str | None = None
    """A simulator: metaworld, so101, aloha_sim, robosuite, or libero with --suite."""
    dataset: str | None = None
    """A LeRobot dataset of the policy's robot, a folder or hf://org/name."""
    seed: int | None = None
    """Seed of episodes, frames and noise, by default 0, and in LIBERO 7; no seed has episodes that `sim record`
    records."""
    num_steps: int | None = None
    """Euler steps from noise to actions; by default 10."""
    out: pathlib.Path | None = None
    """Folder of the plots of errors and chunks, or of each simulated episode as it ends, with the videos and a page: if
    interrupted, the same command goes on from there. By default nothing is kept or drawn."""
    dry_run: bool = False
    """Check policy, tasks and options, and print what would run: nothing is downloaded, loaded or simulated."""
    json: bool = False
    """Print one JSON document."""
    simulation: Annotated[SimulationOptions, tyro.conf.arg(name="")] = SimulationOptions()
    recorded: Annotated[DatasetOptions, tyro.conf.arg(name="")] = DatasetOptions()
    load: Load = SamplingOptions()

    def run(self) -> None:
        if (self.env is None) == (self.dataset is None):
            raise UsageError("eval needs either --env, a simulator, or --dataset, recorded episodes.")
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
            print(f"{name}: {'known when the policy is there' if text is None else text}")

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
            **self.recorded.reading_of(dataset),
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
        # The environment's may be meant for a server that is started from the same shell; only --token is a mistake.
        token = os.environ.get("TORCHPI_TOKEN") if options.token is None and is_address(self.policy) else options.token
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
