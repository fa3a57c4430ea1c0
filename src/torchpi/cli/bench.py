"""Commands that measure: bench, bench serve, bench control."""

import pathlib
from typing import Annotated, Literal

import tyro

from torchpi.cli.common import split_names
from torchpi.errors import UsageError


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
    episodes: str | None = None,
    rename: tuple[str, ...] = (),
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
        compile: run the three stacks, or in training each layer, through torch.compile.
        repeats: timed runs, whose median counts; for data: batches.
        embodiment: for data: its robot, whose cameras are read; by default all cameras are.
        episodes: for data: only these, for example "0:40,57" or "task:open the *".
        rename: for data: LeRobot's names where the set has others, OLD=NEW or, joined, OLD+OLD=NEW.
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
            raise UsageError("bench load needs --policy, a policy folder or checkpoint.")
        from torchpi.bench.loading import run_bench_load

        run_bench_load(policy, dtype=dtype, config=None if config == "mid" else config, as_json=json)
        return
    if what == "data":
        if dataset is None:
            raise UsageError("bench data needs a data set: torchpi bench data DATASET.")
        from torchpi.bench.data import run_bench_data
        from torchpi.data.rename import parse_rename

        run_bench_data(
            dataset,
            embodiment=embodiment,
            config=bench_config(config),
            batch=32 if batch is None else batch,
            workers=workers,
            num_batches=repeats,
            step_seconds=step_seconds,
            episodes=episodes,
            rename=parse_rename(rename),
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
    model_ms: float = 10.0,
    runs: int = 5,
    requests: int = 1000,
    clients: int = 16,
    seconds: float = 60.0,
    guided: str = "mid,demo",
    pairs: int = 7,
    json: bool = False,
) -> None:
    """Measure what a policy server adds to the model's own time, and whether many clients are served alike.

    The server, beside it the smallest loop that receives, infers and sends, and the clients have processes of their
    own and talk over loopback; the model is a pause. Requests of one client go to the server and to the loop in turn;
    their round trips minus inference are compared. Then many clients ask the server at once. At last sampling with
    guidance (real-time chunking) is timed beside plain sampling. With the defaults it takes about three minutes;
    `--runs 1 --requests 200 --seconds 5 --guided ""` is a quick look.

    Args:
        model_ms: how long one pass of the model takes, in milliseconds.
        runs: of the single client, whose medians count.
        requests: in each run, to the server and to the loop.
        clients: that ask at once.
        seconds: that they do so.
        guided: models to sample with guidance and without, separated by commas: mid (47 M parameters) or a preset with
            random weights, or a policy; empty: none.
        pairs: samplings with and without.
        json: print one JSON document.
    """
    from torchpi.bench.serving import run_bench_serving

    run_bench_serving(
        model_ms=model_ms,
        runs=runs,
        requests=requests,
        clients=clients,
        seconds=seconds,
        guided=split_names(guided),
        pairs=pairs,
        as_json=json,
    )


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
        policy, tasks=split_names(tasks), episodes=episodes, delays=_counts(delays), env=env,
        execute_steps=execute_steps, modes=None if modes is None else split_names(modes), late=late, seed=seed,
        workers=workers, out=out, as_json=json,
    )  # fmt: skip


def _counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(name) for name in split_names(text)]
    except ValueError:
        raise UsageError(f"Expected whole numbers separated by commas, got {text!r}.") from None
