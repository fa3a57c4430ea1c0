"""The command line: each command is a function here, its `--help` is its docstring."""

import dataclasses
import inspect
import json
import os
import pathlib
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from torchpi.arrays import read_npy, read_npz
from torchpi.training.config import TrainConfig

PolicyPath = Annotated[str, tyro.conf.arg(metavar="PATH")]


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint does not say itself, or what shall overrule it: arguments of `load_policy`."""

    config: str | None = None
    """For checkpoints that do not say their horizon and prompt format: a preset's name or a JSON file."""
    lora_alpha: tuple[float, float] | None = None
    """Of the backbone and the action expert in a JAX LoRA checkpoint; by default openpi's, 16 32."""
    embodiment: str | None = None
    """For checkpoints that do not say their robot: aloha, droid, libero, … or a JSON file."""
    normalization: Literal["z_score", "quantile"] | None = None
    """For checkpoints that do not say theirs; π₀ was trained with z_score, π₀.₅ with quantile."""
    norm_stats: pathlib.Path | None = None
    """A norm_stats.json, instead of the checkpoint's own."""
    asset_id: str | None = None
    """Which of the checkpoint's assets/<id>/norm_stats.json."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json, instead of the policy's own."""
    default_prompt: str | None = None
    """For observations without a prompt."""

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


Checkpoint = Annotated[CheckpointOptions, tyro.conf.arg(name="")]


def infer(
    policy: PolicyPath,
    inputs: pathlib.Path,
    out: pathlib.Path,
    num_steps: int = 10,
    seed: int = 0,
    noise: pathlib.Path | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Run a policy on one observation.

    The observation is an .npz file with the robot's own keys, nested ones joined with '.', for example
    images.cam_high, state and prompt (a 0-d string). The result is an .npz file with `actions` [H, a].

    Args:
        policy: a policy folder, an openpi checkpoint, or "demo".
        inputs: the observation, an .npz file.
        out: where the actions go, an .npz file.
        num_steps: Euler steps from noise to actions.
        seed: of the noise.
        noise: an .npy file [H, action_dim] to use as noise instead.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print the shape, the file and the timing as one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    import torch

    from torchpi.policy import load_policy

    observation = read_npz(inputs)
    loaded = load_policy(policy, device=device, **checkpoint.given())
    generator = torch.Generator(loaded.model.device).manual_seed(seed)
    start = None if noise is None else read_npy(noise)
    result = loaded.infer(observation, noise=start, num_steps=num_steps, generator=generator)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:  # an open file, because np.savez appends .npz to names without it
        np.savez(file, actions=result["actions"])
    horizon, dims = result["actions"].shape
    if json:
        _print_json({"out": str(out), "shape": [horizon, dims], "policy_timing": result["policy_timing"]})
    else:
        milliseconds = result["policy_timing"]["infer_ms"]
        print(f"{horizon} actions of {dims} dimensions in {milliseconds:.0f} ms, written to {out}")


def demo(
    out: pathlib.Path = pathlib.Path("torchpi_demo"),
    episodes: int = 3,
    tasks: str | None = None,
    instruction: str | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Show the embedded policy at work: a simulated arm opens drawers and doors.

    Prints what the policy is and how it comes from images and words to actions, runs episodes in the simulator, and
    writes a video per task and a page with everything. Where nothing can be rendered, it says what to install, and the
    policy sees packaged camera frames instead.

    Args:
        out: the folder of the videos and of index.html.
        episodes: per task.
        tasks: of Meta-World by name, separated by commas; by default those that the policy was trained on.
        instruction: tell the policy this instead, in the task that --tasks names, or in the first one.
        seed: of episodes and noise.
        workers: processes; by default as many as the CPU's cores and the memory allow.
    """
    from torchpi.demo.run import run_demo

    run_demo(
        out,
        episodes=episodes,
        tasks=None if tasks is None else _names(tasks),
        instruction=instruction,
        seed=seed,
        workers=workers,
    )


def trace(
    target: Annotated[str, tyro.conf.Positional],
    batch: int = 4,
    max_token_len: int | None = None,
    action_horizon: int | None = None,
    action_dim: int | None = None,
    compare: str | None = None,
    html: pathlib.Path | None = None,
    inputs: pathlib.Path | None = None,
    config: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Walk the whole way, from the raw input to the loss and to the actions, and print every tensor.

    A preset (pi05, pi0, …) is walked at its full size without memory for its weights: shapes and dtypes. A policy, or
    "demo", is walked with its weights and an observation: ranges of values as well.

    Args:
        target: a preset's name, the path of a policy or checkpoint, or "demo".
        batch: samples in the batch.
        max_token_len: prompt tokens; by default the target's.
        action_horizon: actions in a chunk; by default the target's.
        action_dim: width of state and actions inside the model; by default the target's.
        compare: a second target, printed side by side.
        html: write the walk as a page of its own, with diagrams and plots.
        inputs: an .npz file: a robot's observation, or a batch in the model's own terms.
        config: for checkpoints that do not say their horizon and prompt format: a preset's name or a JSON file.
        device: where a policy runs.
        json: print one JSON document, a list of {"step", "name", "shape", "dtype", …}.
    """
    from torchpi.trace import run_trace

    run_trace(
        target,
        batch=batch,
        max_token_len=max_token_len,
        action_horizon=action_horizon,
        action_dim=action_dim,
        compare=compare,
        html=html,
        as_json=json,
        inputs=inputs,
        config=config,
        device=device,
    )


def bench(
    what: Annotated[Literal["all", "model", "train", "load", "sim", "data"], tyro.conf.Positional] = "all",
    dataset: Annotated[str | None, tyro.conf.Positional] = None,
    config: str = "mid",
    policy: str | None = None,
    batch: int | None = None,
    cameras: int = 3,
    prompt_tokens: int = 60,
    num_steps: int = 10,
    draws: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    compile: bool = False,
    repeats: int = 5,
    embodiment: str | None = None,
    workers: int = 1,
    step_seconds: float | None = None,
    json: bool = False,
) -> None:
    """Measure beside the floor that this machine allows.

    In one run: the peak of a large matmul and of a large copy, then sampling, one training step, or loading. The
    floor of each operation is the larger of FLOPs / peak and bytes / bandwidth; the table says how it adds up.
    `bench serve` and `bench control`, with options of their own, measure a server and a robot's control.

    Args:
        what: model (sample_actions), train (one step), load (time and memory of loading --policy, and of
            writing its weights into a policy folder), sim (rendering,
            demonstrations, chunks and closed loop of --policy in Meta-World), data (the training loader on DATASET);
            all: the first two.
        dataset: for data: a LeRobot data set, a folder or hf://org/name.
        config: mid (47 M parameters), a preset's name, or a JSON file. The weights are random.
        policy: for load: a policy folder or checkpoint; for sim: a policy for Meta-World, by default "demo".
        batch: samples at once; by default 1, for data 32.
        cameras: cameras of the observation.
        prompt_tokens: real tokens of the prompt; sampling drops the padding behind them.
        num_steps: Euler steps.
        draws: for train: draws of noise and time per sample, which share the pass over the prefix.
        dtype: of the matmuls; weights follow it in sampling, and stay float32 in training.
        device: cpu or cuda.
        compile: run the three stacks through torch.compile.
        repeats: timed runs, whose median counts; for data: batches.
        embodiment: for data: its robot, whose cameras are read; by default all cameras are.
        workers: for data: processes that prepare samples; 0: this one does.
        step_seconds: for data: of a training step; shows for which share of the time it would wait.
        json: print one JSON document.
    """
    from torchpi.bench import bench_config, run_bench

    if what == "sim":
        from torchpi.bench.simulation import run_bench_simulation

        run_bench_simulation(policy or "demo", env="metaworld", task="drawer-open", repeats=repeats, as_json=json)
        return
    if what == "load":
        if policy is None:
            raise ValueError("bench load needs --policy, a policy folder or checkpoint")
        from torchpi.bench.loading import run_bench_load

        run_bench_load(policy, dtype=dtype, config=None if config == "mid" else config, as_json=json)
        return
    if what == "data":
        if dataset is None:
            raise ValueError("bench data needs a data set: torchpi bench data DATASET")
        from torchpi.bench.data import run_bench_data

        run_bench_data(
            dataset,
            embodiment=embodiment,
            config=bench_config(config),
            batch=32 if batch is None else batch,
            workers=workers,
            num_batches=repeats,
            step_seconds=step_seconds,
            as_json=json,
        )
        return
    run_bench(
        [what] if what != "all" else ["model", "train"],
        config=bench_config(config),
        batch=1 if batch is None else batch,
        num_cameras=cameras,
        prompt_tokens=prompt_tokens,
        num_steps=num_steps,
        dtype=dtype,
        device=device,
        compiled=compile,
        repeats=repeats,
        num_draws=draws,
        as_json=json,
    )


def bench_serve(
    model_ms: float = 10.0, clients: int = 16, seconds: float = 10.0, requests: int = 200, json: bool = False
) -> None:
    """Measure what a policy server adds to the model's own time, and whether many clients are served alike.

    Clients and server share this process and talk over loopback; the model is a pause.

    Args:
        model_ms: how long one pass of the model takes, in milliseconds.
        clients: that ask at once.
        seconds: that they do so.
        requests: of a single client, before; its round trips minus the pass are the overhead.
        json: print one JSON document.
    """
    from torchpi.bench.serving import run_bench_serving

    run_bench_serving(model_ms=model_ms, clients=clients, seconds=seconds, requests=requests, as_json=json)


def bench_control(
    policy: str = "demo",
    tasks: str = "drawer-open,faucet-open",
    episodes: int = 10,
    delays: str = "0,1,2,4,8",
    modes: str | None = None,
    env: str = "metaworld",
    execute_steps: int | None = None,
    late: Literal["hold", "stop"] = "hold",
    seed: int = 0,
    workers: int | None = None,
    out: pathlib.Path | None = None,
    json: bool = False,
) -> None:
    """Measure what real-time chunking is worth: a simulated robot under a policy whose chunks come late.

    The same episodes run in each mode at each delay, on a clock that moves from step to step: the policy really infers,
    and its answer arrives exactly so many steps later. A table says how often the task was done, how far the robot
    jumped where one chunk followed another, and how long it stood still.

    Args:
        policy: a policy folder or checkpoint; by default the embedded one.
        tasks: by name, separated by commas.
        episodes: per task, mode and delay.
        delays: control steps from an observation to its chunk, separated by commas.
        modes: of sync, async, ensemble, rtc (guided towards the old chunk) and rtc-trained (its first actions are
            given), separated by commas; by default all that the policy can do.
        env: the simulator.
        execute_steps: of a chunk, before the next is asked for; by default what the policy recommends. In ensemble 1.
        late: what happens where the actions run out before the next chunk is there: hold the robot, or stop.
        seed: of episodes and noise.
        workers: processes; by default as many as the CPU's cores and the memory allow.
        out: folder for control.json and control.png.
        json: print one JSON document.
    """
    from torchpi.bench.control import run_bench_control

    run_bench_control(
        policy, tasks=_names(tasks), episodes=episodes, delays=_counts(delays), env=env, execute_steps=execute_steps,
        modes=None if modes is None else _names(modes), late=late, seed=seed, workers=workers, out=out, as_json=json,
    )  # fmt: skip


def stats(
    dataset: Annotated[str, tyro.conf.Positional],
    embodiment: str,
    out: pathlib.Path | None = None,
    action_horizon: int = 50,
    episodes: str | None = None,
    rename: tuple[str, ...] = (),
    compare: str | None = None,
    json: bool = False,
) -> None:
    """Show the statistics of a data set, and write those that a policy normalizes with.

    They are exact, from all frames, in the model's terms: units converted, actions relative to the state where the
    embodiment says so. Dimensions that hardly move are named, because normalization makes rare values huge there, and
    idle frames are counted. Images are not read.

    Args:
        dataset: a LeRobot data set, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision].
        embodiment: the robot: metaworld, aloha, … or a JSON file.
        out: where openpi's norm_stats.json goes, a file or an existing folder; by default nothing is written.
        action_horizon: actions in a chunk.
        episodes: only these, for example "0:40,57,100:" or "task:open the *"; both: "0:40; task:open the *".
        rename: LeRobot's names where the set has others, OLD=NEW: state=observation.state actions=action.
        compare: a checkpoint: shows for each of its robots which share of the data is inside of its q01 to q99.
        json: print one JSON document.
    """
    from torchpi.data.rename import parse_rename
    from torchpi.data.stats_report import run_stats

    run_stats(
        dataset,
        embodiment=embodiment,
        out=out,
        action_horizon=action_horizon,
        episodes=episodes,
        rename=parse_rename(rename),
        compare=compare,
        as_json=json,
    )


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[pathlib.Path, tyro.conf.Positional],
    to: Literal["torchpi", "openpi-jax", "openpi-pytorch", "lerobot"],
    dtype: Literal["float32", "bfloat16"] | None = None,
    action_dim: int | None = None,
    action_horizon: int | None = None,
    max_token_len: int | None = None,
    max_shard_gb: float = 5.0,
    overwrite: bool = False,
    check: bool = True,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Write a checkpoint in another format.

    Every array of SOURCE is written, folded or named. TARGET is complete or not there. Afterwards it is read back, and
    its arrays and the actions sampled from them are compared with the source's.

    Args:
        source: a policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot; a folder, hf://… or gs://….
        target: a new folder.
        to: the format.
        dtype: of the arrays; by default the source's.
        action_dim: another width of actions and state: weights are cut, or extended by zeros.
        action_horizon: another number of actions in a chunk.
        max_token_len: another number of prompt tokens.
        max_shard_gb: a policy folder's weights are written in shards of this size; other systems read one file only.
        overwrite: replace a target that is there.
        check: read the target back and compare; takes about as long as the conversion.
        json: print the report as one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    import torch

    from torchpi.convert import convert, print_conversion

    sizes = {"action_dim": action_dim, "action_horizon": action_horizon, "max_token_len": max_token_len}
    result = convert(
        source,
        target,
        to,
        dtype=None if dtype is None else getattr(torch, dtype),
        sizes={field: value for field, value in sizes.items() if value is not None},
        max_shard_bytes=int(max_shard_gb * 1e9),
        overwrite=overwrite,
        check=check,
        **checkpoint.given(),
    )
    if json:
        _print_json(result.to_dict())
    else:
        print_conversion(result)


def doctor(
    policy: Annotated[str, tyro.conf.Positional],
    observation: pathlib.Path | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> int:
    """Show what a policy is, and what would make a robot misbehave.

    Checks weights and statistics; with an observation also its state, prompt and cameras, the actions that come out,
    and what the policy reads: how far the chunk moves when a camera is black, cameras are swapped, the instruction is
    another one or the state is its mean. The exit status is 1 where something is wrong.

    Args:
        policy: a policy folder, a checkpoint, hf://…, gs://…, or "demo".
        observation: an .npz file with the robot's own keys, as for infer.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    from torchpi.doctor import run_doctor

    load = checkpoint.given() | ({} if device is None else {"device": device})
    return run_doctor(policy, observation=observation, as_json=json, **load)


def compare(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    observation: pathlib.Path,
    tolerance: float | None = None,
    device: str | None = None,
    json: bool = False,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> int:
    """Walk two policies stage by stage, and name the first stage in which they differ.

    The same observation and noise go through both: prompt, images, state, image tokens, cache, velocity, chunk, and
    actions in the robot's units. The exit status is 1 if they differ.

    Args:
        a: a policy, as for doctor.
        b: another one.
        observation: an .npz file with the robot's own keys, as for infer.
        tolerance: how far two stages may be apart, in parts of their scale.
        device: for example cuda or cpu; by default cuda where there is one.
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    from torchpi.compare import TOLERANCE, run_compare

    return run_compare(
        a,
        b,
        observation=observation,
        as_json=json,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        device=device,
        **checkpoint.given(),
    )


def train_command(base: TrainConfig) -> Callable[..., int | None]:
    """The command `train`, whose defaults are those of a recipe."""

    def train(
        out: pathlib.Path | None = None,
        recipe: str | None = None,
        resume: pathlib.Path | None = None,
        plan: bool = False,
        plan_world: int | None = None,
        plan_memory: float | None = None,
        json: bool = False,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = base,
    ) -> int | None:
        """Train a policy on a LeRobot dataset.

        OUT gets train.json (the recipe), metrics.jsonl, curves.png and checkpoints/STEP/policy, a policy folder with
        the averaged weights. Ctrl-C stops after the current step and saves; --resume goes on from there.

        Args:
            out: the run's folder, new or empty.
            recipe: where the defaults below come from: a packaged recipe (metaworld), or a JSON file, such as the
                train.json of another run.
            resume: the folder of a run to go on with, by default as it was; more steps, another number of processes
                and what else does not change its updates may be given.
            plan: do not train, but print the memory that it would take, and what to change where it does not fit; the
                exit status is 1 then. Of the data set only the embodiment is needed.
            plan_world: with --plan: processes that will share the run, by default those that torchrun has started.
            plan_memory: with --plan: each device's memory in GB, by default what this machine has.
            json: with --plan: print one JSON document.
            config: the fields of the recipe.
        """
        if plan:
            from torchpi.training.plan import run_plan

            return run_plan(config, world_size=plan_world, memory_gb=plan_memory, as_json=json)
        if plan_world is not None or plan_memory is not None or json:
            raise ValueError("--plan-world, --plan-memory and --json belong to --plan")
        from torchpi.training.loop import train

        if resume is not None and (out is not None or recipe is not None):
            raise ValueError("--resume goes on with a run, its recipe and its folder; leave --out and --recipe out")
        out = out or resume
        needed = {"out": out} | ({} if config.mixture else {"dataset": config.dataset, "embodiment": config.embodiment})
        for name, value in needed.items():
            if not value:
                raise ValueError(
                    f"train needs --{name}, or --resume with the folder of a run; see torchpi train --help"
                )
        assert out is not None
        result = train(config, out, resume=resume is not None)
        if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
            return 0
        if result.interrupted:
            print(f"interrupted after {result.step} steps; go on with: torchpi train --resume {out}")
        print(f"policy: {result.policy}\nreport: {result.report}")
        return None

    return train


def _recipe_of(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    """What --recipe or --resume name, which decides the defaults of the other options."""
    for option, read in (("--recipe", TrainConfig.from_json), ("--resume", _resumed)):
        for i, argument in enumerate(args):
            if argument == option and i + 1 < len(args):
                return read(args[i + 1])
            if argument.startswith(f"{option}="):
                return read(argument.removeprefix(f"{option}="))
    return default


def _resumed(run: str) -> TrainConfig:
    from torchpi.training.resume import resume_config

    return resume_config(pathlib.Path(run))


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
            state=observation.state actions=action.
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
        json: print one JSON document.
        checkpoint: what the checkpoint does not say itself.
    """
    load = checkpoint.given() | ({} if device is None else {"device": device})
    simulated = {
        "tasks": tasks, "episodes": episodes, "workers": workers, "execute_steps": execute_steps,
        "max_steps": max_steps, "swap": swap, "blank_images": blank_images, "videos": videos,
    }  # fmt: skip
    if (env is None) == (dataset is None):
        raise ValueError("eval needs either --env, a simulator, or --dataset, recorded episodes")
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
    from torchpi.sim.report import print_evaluation, swapped_instructions
    from torchpi.sim.rollout import Rollout

    # Last, because it brings torch.
    from torchpi.sim.evaluate import evaluate as run  # isort: skip

    result = run(
        policy,
        env,
        tasks=None if tasks is None else _names(tasks),
        episodes=episodes,
        seed=seed,
        rollout=Rollout(execute_steps, num_steps, max_steps, blank_images=blank_images),
        instructions=swapped_instructions(env, _names(swap or "")),
        workers=workers,
        videos=videos,
        out=out,
        load=load,
    )
    if json:
        _print_json(result.to_dict())
    else:
        print_evaluation(result)


def _refuse_changed(command: Callable[..., Any], options: dict[str, Any], *, belongs_to: str) -> None:
    """Raises a ValueError about options that are not at their default, though they say nothing here."""
    parameters = inspect.signature(command).parameters
    changed = [f"--{name.replace('_', '-')}" for name, value in options.items() if value != parameters[name].default]
    if changed:
        raise ValueError(f"{', '.join(changed)} can only be given with {belongs_to}")


def serve(
    policy: Annotated[str | None, tyro.conf.Positional] = None,
    policies: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    num_steps: int = 10,
    seed: int = 0,
    max_batch: int = 8,
    max_queue: int = 64,
    deadline: float = 30.0,
    max_connections: int = 64,
    max_message_mb: float = 32.0,
    max_rate: float = 200.0,
    grace: float = 10.0,
    record: pathlib.Path | None = None,
    device: str | None = None,
    checkpoint: Checkpoint = CheckpointOptions(),
) -> None:
    """Serve a policy to robots, in openpi's websocket protocol: its clients and torchpi-client work.

    Connections are accepted at once; the policy's metadata follow when it is loaded and warm. /healthz answers 200
    from then on, /metrics is for Prometheus. In a browser http://HOST:PORT/ shows what the robots see, their chunks and
    the latency; with a token, http://HOST:PORT/?token=TOKEN. Ctrl-C or SIGTERM ends it, when what has been received is
    answered.

    Args:
        policy: a policy folder, a checkpoint, hf://…, gs://…, or "demo".
        policies: further ones as name=path, served at ws://HOST:PORT/NAME; they say everything themselves.
        host: where to listen; 0.0.0.0: on every network of this machine.
        port: 0: a free one.
        token: what clients must send as Authorization: Bearer TOKEN, or Api-Key TOKEN; by default what the environment
            has as TORCHPI_TOKEN, or else nothing is asked for.
        num_steps: Euler steps of a request that does not say.
        seed: of the noise of requests that bring none.
        max_batch: requests in one pass of the model. They are answered as if each were alone.
        max_queue: requests that may wait for the model.
        deadline: seconds that a request may wait for the model; then it is dropped, and its client told.
        max_connections: clients at once.
        max_message_mb: size of a request in MiB.
        max_rate: requests per second of one client.
        grace: seconds in which what has been received is answered at the end.
        record: keep requests and chunks as a LeRobot data set in this folder, new or empty; of several policies, one
            set per name.
        device: for example cuda or cpu; by default cuda where there is one.
        checkpoint: what POLICY's checkpoint does not say itself.
    """
    from torchpi.serving.settings import ServeSettings

    settings = ServeSettings(
        host=host, port=port, token=os.environ.get("TORCHPI_TOKEN") if token is None else token, num_steps=num_steps,
        seed=seed, max_batch=max_batch, max_queue=max_queue, deadline=deadline, max_connections=max_connections,
        max_message_mb=max_message_mb, max_rate=max_rate, grace=grace,
    )  # fmt: skip
    # Last, because it brings torch.
    from torchpi.serving.run import run_serve

    run_serve(policy, policies, settings, record=record, load=checkpoint.given(), device=device)


def sim_record(
    out: pathlib.Path,
    tasks: str,
    episodes: int,
    env: str = "metaworld",
    seed: int = 0,
    noise: float = 0.4,
    noisy_fraction: float = 0.5,
    push_rate: float = 0.02,
    video: bool = False,
    image_size: int | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Record a simulator's scripted experts as a LeRobot data set.

    A part of the episodes is disturbed, and shows how to come back from where the expert alone would not go. Ctrl-C
    keeps the episodes that are complete. The seed decides the data set; the number of workers changes nothing.

    Args:
        out: the data set's folder, new or empty.
        tasks: by name, separated by commas, for example drawer-open,door-open.
        episodes: per task.
        env: the simulator; metaworld has experts.
        seed: of the whole recording; no seed has episodes that `eval` runs.
        noise: standard deviation of the disturbance of the executed actions, which are from -1 to 1.
        noisy_fraction: the part of each task's episodes that is disturbed.
        push_rate: how probable it is at each step of these that the arm is pushed somewhere else, for 5 to 20 steps:
            shows how to begin again after a miss.
        video: write the cameras as video (small, lossy) instead of PNG (exact).
        image_size: height and width of the images; by default the simulator's.
        workers: processes; by default as many as the CPU's cores and the memory allow.
        json: print one JSON document.
    """
    from torchpi.sim.record import record

    options: dict[str, Any] = {
        "seed": seed,
        "noise": noise,
        "noisy_fraction": noisy_fraction,
        "push_rate": push_rate,
        "image_size": image_size,
        "video": video,
    }
    command = _as_command("sim record", {"env": env, "tasks": tasks, "episodes": episodes, "out": out, **options})
    result = record(env, _names(tasks), episodes, out, workers=workers, command=command, **options)
    if json:
        _print_json(dataclasses.asdict(result))
    else:
        failures = sum(result.failures.values())
        print(
            f"{result.episodes} episodes, {result.frames} frames in {result.seconds:.0f} s, written to {result.path}; "
            f"{failures} in which the expert failed were left out"
        )


def _as_command(name: str, arguments: dict[str, Any]) -> str:
    """A command line with these arguments; those that are None are left out."""
    words = ["torchpi", *name.split()]
    for argument, value in arguments.items():
        flag = argument.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def _names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from None


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "trace": trace,
    "bench": bench,
    "bench serve": bench_serve,
    "bench control": bench_control,
    "stats": stats,
    "infer": infer,
    "convert": convert,
    "doctor": doctor,
    "compare": compare,
    "train": train_command(TrainConfig()),
    "eval": evaluate,
    "serve": serve,
    "sim record": sim_record,
}


def train_recipe(recipe: TrainConfig) -> None:
    """What a recipe's Python file runs: `torchpi train` with the recipe's values as defaults of its options."""
    main(["train", *sys.argv[1:]], recipe)


def main(argv: Sequence[str] | None = None, recipe: TrainConfig | None = None) -> None:
    """Run a command; a user's mistake ends with one line on stderr and exit status 1.

    Args:
        argv: the command's words; by default the process'.
        recipe: the defaults of `train`.
    """
    warnings.showwarning = _show_warning
    args = list(sys.argv[1:] if argv is None else argv)
    if " ".join(args[:2]) in COMMANDS:  # of two words
        args[:2] = [" ".join(args[:2])]
    commands = dict(COMMANDS)
    try:
        if args[:1] == ["train"]:
            commands["train"] = train_command(_recipe_of(args, recipe or TrainConfig()))
        status = tyro.extras.subcommand_cli_from_dict(
            commands, prog="torchpi", description="π₀ and π₀.₅ in plain PyTorch.", args=args, sort_subcommands=False
        )
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        # str() of a KeyError quotes its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error:", message, *getattr(error, "__notes__", ()), file=sys.stderr)
        raise SystemExit(1) from None
    if status:
        raise SystemExit(status)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_json(document: Any) -> None:
    print(json.dumps(document))


if __name__ == "__main__":
    main()
