"""Commands that run a policy: demo, infer, trace."""

import dataclasses
import pathlib
from typing import Annotated, Any

import numpy as np
import tyro

from torchpi.arrays import read_npy, read_npz
from torchpi.atomic import atomic_file
from torchpi.cli.common import (
    FrameOptions,
    Frames,
    Load,
    LoadModel,
    PolicyOptions,
    SamplingOptions,
    refuse_changed,
    split_names,
)
from torchpi.randomness import checked_seed
from torchpi.samples import SAMPLE_FIELDS, PickName
from torchpi.threads import limit_threads, spin_briefly
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Demo:
    """Show the embedded policy at work: a simulated arm opens drawers and doors.

    Prints a description of the policy and its data flow, runs episodes in the simulator, and writes a video per task
    and a page with everything. Where nothing can be rendered, it says what to install, and the policy sees packaged
    camera frames instead.
    """

    out: pathlib.Path = pathlib.Path("torchpi_demo")
    """Folder of the videos and of index.html."""
    episodes: int = 3
    """Episodes per task."""
    tasks: str | None = None
    """Tasks of Meta-World by name, separated by commas; by default those that the policy was trained on."""
    instruction: str | None = None
    """Another instruction for the policy, in the task that --tasks names, or in the first one."""
    seed: int = 0
    """Seed of episodes and noise."""
    workers: int | None = None
    """Processes; by default as many as the CPU's cores and the memory allow."""
    rerun: pathlib.Path | None = None
    """Write the first episode of each task as a new .rrd file for the viewer Rerun."""

    def run(self) -> None:
        from torchpi.demo.run import run_demo

        options = vars(self) | {"tasks": None if self.tasks is None else split_names(self.tasks)}
        if (target := options.pop("rerun")) is None:
            run_demo(**options)
            return
        from torchpi.demo.replay import log_episodes
        from torchpi.evaluation.view import rerun_log

        with rerun_log(target) as log:  # before the demo, which takes minutes: it may not be possible to write there
            log_episodes(run_demo(**options), log)
        print(f"wrote {target}; show it with: rerun {target}")


@dataclasses.dataclass(frozen=True)
class Infer:
    """Run a policy on one observation.

    The observation is an .npz file with the robot's own keys, nested ones joined with '.', for example
    images.cam_high, state and prompt (a 0-d string). The result is an .npz file with `actions` [H, a]; with
    --num-samples N also `samples` [N, H, a], the index of the one that was picked, and their spread.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder, a checkpoint, hf://…, gs://…, or "demo"."""
    inputs: pathlib.Path
    """The observation, an .npz file."""
    out: pathlib.Path
    """The file that the actions are written to, an .npz."""
    num_steps: int | None = None
    """Euler steps from noise to actions; by default the policy's, which are 10 unless it says otherwise."""
    num_samples: int | None = None
    """Chunks to sample, of which one is picked; they share the work on the images and the prompt."""
    pick: PickName | None = None
    """The choice among them: consensus, the one with the least mean distance to the others (by default),
    velocity_residual, the one whose path from noise to actions is the straightest, or first, as without
    --num-samples."""
    seed: int = 0
    """Seed of the noise."""
    noise: pathlib.Path | None = None
    """An .npy file [H, action_dim], or [N, H, action_dim] with --num-samples, to use as noise instead."""
    json: bool = False
    """Print the shape, the file and the timing as one JSON document."""
    load: Load = SamplingOptions()

    def run(self) -> None:
        spin_briefly()
        import torch

        from torchpi.policy import load_policy

        observation = read_npz(self.inputs)
        policy = load_policy(self.policy, **self.load.given())
        limit_threads(policy.model)
        generator = torch.Generator(policy.model.device).manual_seed(checked_seed(self.seed))
        noise = None if self.noise is None else read_npy(self.noise)
        result: dict[str, Any] = dict(
            policy.infer(
                observation, noise=noise, num_steps=self.num_steps, num_samples=self.num_samples, pick=self.pick,
                generator=generator,
            )
        )  # fmt: skip
        with atomic_file(self.out) as part, part.open("wb") as file:  # np.savez appends .npz to names
            np.savez(file, **{name: result[name] for name in ("actions", *SAMPLE_FIELDS) if name in result})
        horizon, dims = result["actions"].shape
        timing = result["policy_timing"]
        if self.json:
            document = {"out": str(self.out), "shape": [horizon, dims], "policy_timing": timing}
            print_json(document | {name: result[name] for name in ("sample_index", "uncertainty") if name in result})
            return
        print(f"{horizon} actions of {dims} dimensions in {timing['infer_ms']:.0f} ms, written to {self.out}")
        if "uncertainty" in result:
            print(
                f"sample {result['sample_index']} of {self.num_samples}; uncertainty "
                f"{100 * result['uncertainty']:.3g} % of the training range"
            )


@dataclasses.dataclass(frozen=True)
class Trace:
    """Run the whole forward pass, from the robot's observation to the loss and to the actions, and print every tensor.

    A preset (pi05, pi0, …) is traced at its full size without memory for its weights: shapes and dtypes. A policy, or
    "demo", is traced with its weights and an observation: ranges of values as well.
    """

    target: Annotated[str | None, tyro.conf.Positional] = None
    """A preset's name, the path of a policy or checkpoint, or "demo"."""
    compare: tuple[str, ...] = ()
    """Another target, or two of them, printed side by side in this order; sizes that are given are those of both."""
    batch: int = 4
    """Samples in the batch."""
    max_token_len: int | None = None
    """Prompt tokens; by default the target's."""
    action_horizon: int | None = None
    """Actions in a chunk; by default the target's."""
    action_dim: int | None = None
    """Width of state and actions inside the model; by default the target's."""
    html: pathlib.Path | None = None
    """Write the trace as a page, with diagrams and plots."""
    inputs: pathlib.Path | None = None
    """An .npz file: a robot's observation, or a batch with the model's own keys."""
    dataset: str | None = None
    """A dataset of the policy's robot, of which a frame gives the observation and the actions of the loss."""
    episode: int = 0
    """Of the dataset."""
    frame: int = 0
    """Of the episode."""
    prompt: str | None = None
    """The instruction of the dataset's frame, in place of its task."""
    json: bool = False
    """Print one JSON document, a list of {"step", "name", "shape", "dtype", …}."""
    frames: Frames = FrameOptions()
    load: LoadModel = PolicyOptions()

    def run(self) -> None:
        from torchpi.demo.frames import demo_observation
        from torchpi.inspect.commands import run_trace
        from torchpi.inspect.inputs import Shapes, Source

        if self.dataset is None:
            refuse_changed(self.frames, belongs_to="--dataset")
        targets = [*([self.target] if self.target else []), *self.compare]
        shapes = Shapes(self.batch, self.max_token_len, self.action_horizon, self.action_dim)
        reading = self.frames.reading() | {"prompt": self.prompt}
        source = Source(self.inputs, self.dataset, self.episode, self.frame, reading, demo=demo_observation())
        run_trace(targets, shapes, source, html=self.html, as_json=self.json, **self.load.given())
