"""The command eval."""

import dataclasses
import os
import pathlib
from typing import Annotated

import tyro

from torchpi.cli.common import EpisodeOptions, Load, SamplingOptions, refuse_changed, split_names
from torchpi.errors import UsageError
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class SimulationOptions:
    """Options of --env."""

    tasks: str | None = None
    """With --env: tasks by name, separated by commas; by default those that the policy was trained on."""
    episodes: int = 20
    """With --env: episodes per task."""
    workers: int | None = None
    """With --env: processes; by default as many as the CPU's cores and the memory allow, and one on a GPU."""
    execute_steps: int | None = None
    """With --env: actions of each chunk to execute; by default what the policy recommends, or half of the chunk."""
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
    """A simulator: metaworld, so101 or aloha_sim."""
    dataset: str | None = None
    """A LeRobot dataset of the policy's robot, a folder or hf://org/name."""
    seed: int = 0
    """Seed of episodes, frames and noise; no seed has episodes that `sim record` records."""
    num_steps: int | None = None
    """Euler steps from noise to actions; by default 10."""
    out: pathlib.Path | None = None
    """Folder of the videos, or of the plots of errors and chunks; by default nothing is drawn."""
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

    def _predict(self, dataset: str) -> None:
        """Evaluate on recorded episodes."""
        from torchpi.evaluation.report import run_dataset_evaluation

        run_dataset_evaluation(
            self.policy,
            dataset,
            samples=self.recorded.samples,
            seed=self.seed,
            num_steps=self.num_steps,
            batch_size=self.recorded.batch_size,
            out=self.out,
            load=self.load.given(),
            as_json=self.json,
            **self.recorded.reading_of(dataset),
        )

    def _simulate(self) -> None:
        """Evaluate in a simulator."""
        assert self.env is not None
        from torchpi.sim import swapped_instructions
        from torchpi.sim.actors import is_address
        from torchpi.sim.evaluate import evaluate
        from torchpi.sim.result import print_evaluation
        from torchpi.sim.rollout import Rollout

        options = self.simulation
        # The environment's may be meant for a server that is started from the same shell; only --token is a mistake.
        token = os.environ.get("TORCHPI_TOKEN") if options.token is None and is_address(self.policy) else options.token
        result = evaluate(
            self.policy,
            self.env,
            tasks=None if options.tasks is None else split_names(options.tasks),
            episodes=options.episodes,
            seed=self.seed,
            rollout=Rollout(
                options.execute_steps, self.num_steps, options.max_steps, blank_images=options.blank_images
            ),
            instructions=swapped_instructions(self.env, split_names(options.swap or "")),
            workers=options.workers,
            videos=options.videos,
            out=self.out,
            load=self.load.given(),
            token=token,
        )
        if self.json:
            print_json(result.to_dict())
        else:
            print_evaluation(result)
