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
    PolicyPath,
    SamplingOptions,
    refuse_changed,
    split_names,
)
from torchpi.errors import UsageError
from torchpi.randomness import checked_seed
from torchpi.samples import SAMPLE_FIELDS, PickName
from torchpi.threads import limit_threads, spin_briefly
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Demo:
    """Run the embedded policy: a simulated arm opens drawers and doors.

    The demo prints a description of the policy and its data flow, runs episodes in the simulator, and writes a video
    per task and a page with all results. If nothing can be rendered, it says what to install and runs the policy on
    packaged camera frames instead.
    """

    out: pathlib.Path = pathlib.Path("torchpi_demo")
    """Output folder for the videos and index.html."""
    episodes: int = 3
    """Episodes per task."""
    tasks: str | None = None
    """Names of Meta-World tasks, separated by commas; by default the tasks that the policy was trained on."""
    instruction: str | None = None
    """Instruction to give the policy instead of the task's own; applies to the task in --tasks, or to the first one."""
    seed: int = 0
    """Random seed for episodes and noise."""
    workers: int | None = None
    """Number of simulator processes; by default limited by CPU cores and memory."""
    rerun: pathlib.Path | None = None
    """Write the first episode of each task to a new .rrd file for the Rerun viewer."""

    def run(self) -> None:
        from torchpi.demo.run import run_demo

        options = vars(self) | {"tasks": None if self.tasks is None else split_names(self.tasks)}
        target = options.pop("rerun")
        if target is None:
            run_demo(**options)
            return
        from torchpi.demo.replay import log_episodes
        from torchpi.evaluation.view import rerun_log

        with rerun_log(target) as log:  # opened first: an unwritable path must fail before minutes of simulation
            log_episodes(run_demo(**options), log)
        print(f"wrote {target}; show it with: rerun {target}")


@dataclasses.dataclass(frozen=True)
class Infer:
    """Run a policy on one observation.

    The observation is an .npz file with the robot's own keys, such as images.cam_high, state and prompt (a 0-d
    string); nested keys are joined with '.'. The result is an .npz file with `actions` [H, a]. With --num-samples R it
    also has `samples` [R, H, a], the index of the selected sample, and the spread of the samples.

    Values in another unit than the robot's are not noticed; `torchpi doctor POLICY --inputs FILE.npz` checks them.
    """

    policy: PolicyPath
    inputs: pathlib.Path
    """Observation, an .npz file."""
    out: pathlib.Path
    """Output file for the actions, .npz."""
    num_steps: int | None = None
    """Number of Euler steps from noise to actions; by default the policy's setting, or 10 if it has none."""
    num_samples: int | None = None
    """Number of chunks to sample, from which one is selected; all share one prefix computation."""
    pick: PickName | None = None
    """Selection of the chunk: consensus (default), the one closest on average to the others;
    velocity_residual, the one with the straightest path from noise to actions;
    first, the one that is sampled without --num-samples."""
    seed: int = 0
    """Random seed for the noise."""
    noise: pathlib.Path | None = None
    """Noise to use instead of random noise: an .npy file [H, action_dim], or [R, H, action_dim] with --num-samples."""
    json: bool = False
    """Print shape, output file and timing as one JSON document."""
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
    """Trace the whole forward pass: every tensor from the robot's observation to the loss and the actions.

    A preset (pi05, pi0, …) is traced at full size without allocating its weights, which gives shapes and dtypes. A
    policy, or "demo", is traced with its weights and an observation, which also gives value ranges.
    """

    target: Annotated[str | None, tyro.conf.Positional] = None
    """Preset name, path of a policy or checkpoint, or "demo"."""
    compare: tuple[str, ...] | None = None
    """Compare the target with a second one, or give both here. Both get the sizes set by the options below."""
    batch: int = 4
    """Batch size."""
    max_token_len: int | None = None
    """Number of prompt tokens; by default the target's."""
    action_horizon: int | None = None
    """Number of actions in a chunk; by default the target's."""
    action_dim: int | None = None
    """Width of state and actions inside the model; by default the target's."""
    html: pathlib.Path | None = None
    """Write the trace as an HTML page with diagrams and plots."""
    inputs: pathlib.Path | None = None
    """Input, an .npz file: a robot's observation, or a batch with the model's own keys."""
    dataset: str | None = None
    """Dataset of the policy's robot; one frame supplies the observation and the actions for the loss."""
    episode: int = 0
    """Episode of the dataset."""
    frame: int = 0
    """Frame of the episode."""
    prompt: str | None = None
    """Prompt to use instead of the frame's task text."""
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
        targets = [*([self.target] if self.target else []), *(self.compare or ())]
        if not targets:
            raise UsageError("trace needs a target, such as torchpi trace pi05.")
        if len(targets) != (1 if self.compare is None else 2):
            raise UsageError(f"--compare needs two targets, got {len(targets)}: {', '.join(targets)}.")
        shapes = Shapes(self.batch, self.max_token_len, self.action_horizon, self.action_dim)
        dataset_args = self.frames.dataset_args() | {"prompt": self.prompt}
        source = Source(self.inputs, self.dataset, self.episode, self.frame, dataset_args, demo=demo_observation())
        run_trace(targets, shapes, source, html=self.html, as_json=self.json, **self.load.given())
