"""Commands that measure: bench, bench serve, bench control."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from torchpi.cli.common import split_names
from torchpi.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure, compared with the floor that this machine allows.

    In one run: the peak of a large matmul and of a large copy, then sampling, one training step, or loading. The
    floor of each operation is the larger of FLOPs / peak and bytes / bandwidth; the table says how it adds up.
    `bench serve` and `bench control`, with options of their own, measure a server and a robot's control.
    """

    what: Annotated[Literal["all", "model", "train", "load", "sim", "data"], tyro.conf.Positional] = "all"
    """model (sample_actions), train (one step), load (time and memory of loading --policy, and of writing its weights
    into a policy folder), sim (rendering, demonstrations, chunks and closed loop of --policy in Meta-World), data (the
    training loader on DATASET); all: the first two."""
    dataset: Annotated[str | None, tyro.conf.Positional] = None
    """For data: a LeRobot dataset, a folder or hf://org/name."""
    config: str = "mid"
    """Mid (47 M parameters), a preset's name, or a JSON file. The weights are random."""
    policy: str | None = None
    """For load: a policy folder or checkpoint; for sim: a policy for Meta-World, by default "demo"."""
    batch: int | None = None
    """Samples at once; by default 1, for data 32."""
    cameras: int = 3
    """Cameras of the observation."""
    prompt_tokens: int = 60
    """Valid tokens of the prompt; sampling drops the padding behind them."""
    num_steps: int = 10
    """Euler steps."""
    draws: int = 1
    """For train: pairs of noise and time per observation, which share one forward pass over the prefix."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matmuls; weights follow it in sampling, and stay float32 in training."""
    device: str = "cpu"
    """Cpu or cuda."""
    compile: bool = False
    """Run the three stacks, or in training each layer, through torch.compile."""
    repeats: int = 5
    """Timed runs, whose median counts; for data: batches."""
    embodiment: str | None = None
    """For data: its robot, whose cameras are read; by default all cameras are."""
    episodes: str | None = None
    """For data: only these, for example "0:40,57" or "task:open the *"."""
    rename: tuple[str, ...] = ()
    """For data: LeRobot's names where the dataset has others, OLD=NEW or, joined, OLD+OLD=NEW."""
    workers: int = 1
    """For data: processes that prepare samples; 0: this one does."""
    step_seconds: float | None = None
    """For data: duration of a training step; shows for which fraction of the time it would wait."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.bench import bench_config

        if self.what == "sim":
            from torchpi.bench.simulation import run_bench_simulation

            policy = self.policy or "demo"
            run_bench_simulation(policy, env="metaworld", task="drawer-open", repeats=self.repeats, as_json=self.json)
        elif self.what == "load":
            if self.policy is None:
                raise UsageError("bench load needs --policy, a policy folder or checkpoint.")
            from torchpi.bench.loading import run_bench_load

            config = None if self.config == "mid" else self.config
            run_bench_load(self.policy, dtype=self.dtype, config=config, as_json=self.json)
        elif self.what == "data":
            self._run_data(bench_config(self.config))
        else:
            self._run_model(bench_config(self.config))

    def _run_data(self, config: Any) -> None:
        if self.dataset is None:
            raise UsageError("bench data needs a dataset: torchpi bench data DATASET.")
        from torchpi.bench.data import run_bench_data
        from torchpi.data.rename import parse_rename

        run_bench_data(
            self.dataset,
            embodiment=self.embodiment,
            config=config,
            batch=32 if self.batch is None else self.batch,
            workers=self.workers,
            num_batches=self.repeats,
            step_seconds=self.step_seconds,
            episodes=self.episodes,
            rename=parse_rename(self.rename),
            as_json=self.json,
        )

    def _run_model(self, config: Any) -> None:
        from torchpi.bench import run_bench

        run_bench(
            [self.what] if self.what != "all" else ["model", "train"],
            config=config,
            batch=1 if self.batch is None else self.batch,
            num_cameras=self.cameras,
            prompt_tokens=self.prompt_tokens,
            num_steps=self.num_steps,
            dtype=self.dtype,
            device=self.device,
            compiled=self.compile,
            repeats=self.repeats,
            num_draws=self.draws,
            as_json=self.json,
        )


@dataclasses.dataclass(frozen=True)
class BenchServe:
    """Measure what a policy server adds to the model's own time, and whether many clients are served alike.

    The server, the smallest loop that receives, infers and sends, and the clients have processes of their own and talk
    over loopback; the model is a pause. Requests of one client go to the server and to the loop in turn; their round
    trips minus inference are compared. Then many clients send requests at once. At last sampling with guidance
    (real-time chunking) is timed against plain sampling. With the defaults it takes about three minutes;
    `--runs 1 --requests 200 --seconds 5 --guided ""` is a quick look.
    """

    model_ms: float = 10.0
    """Duration of one forward pass of the model, in milliseconds."""
    runs: int = 5
    """Runs of the single client, whose medians count."""
    requests: int = 1000
    """Requests in each run, to the server and to the loop."""
    clients: int = 16
    """Clients that send requests at once."""
    seconds: float = 60.0
    """Seconds for which they do so."""
    guided: str = "mid,demo"
    """Models to sample with guidance and without, separated by commas: mid (47 M parameters) or a preset with random
    weights, or a policy; empty: none."""
    pairs: int = 7
    """Samplings with and without guidance."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.bench.serving import run_bench_serving

        arguments = vars(self) | {"guided": split_names(self.guided)}
        run_bench_serving(as_json=arguments.pop("json"), **arguments)


@dataclasses.dataclass(frozen=True)
class BenchControl:
    """Measure the effect of real-time chunking: a simulated robot under a policy whose chunks come late.

    The same episodes run in each mode at each delay, on a clock that moves from step to step: the policy really infers,
    and its answer arrives exactly so many steps later. A table says how often the task was done, how far the robot
    jumped where one chunk followed another, and how long it stood still.
    """

    policy: str = "demo"
    """A policy folder or checkpoint; by default the embedded one."""
    tasks: str = "drawer-open,faucet-open"
    """Tasks by name, separated by commas."""
    episodes: int = 10
    """Episodes per task, mode and delay."""
    delays: str = "0,1,2,4,8"
    """Control steps from an observation to its chunk, separated by commas."""
    modes: str | None = None
    """Modes, of sync, async, ensemble, rtc (guided towards the old chunk) and rtc-trained (conditioned on its first
    actions), separated by commas; by default all that the policy supports."""
    env: str = "metaworld"
    """The simulator."""
    execute_steps: int | None = None
    """Actions of a chunk to execute before the next is requested; by default what the policy recommends. In ensemble
    1."""
    late: Literal["hold", "stop"] = "hold"
    """Behaviour where the actions run out before the next chunk has arrived: hold the robot, or stop."""
    seed: int = 0
    """Seed of episodes and noise."""
    workers: int | None = None
    """Processes; by default as many as the CPU's cores and the memory allow."""
    out: pathlib.Path | None = None
    """Folder for control.json and control.png."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.bench.control import run_bench_control

        arguments = vars(self) | {
            "tasks": split_names(self.tasks),
            "delays": _counts(self.delays),
            "modes": None if self.modes is None else split_names(self.modes),
        }
        run_bench_control(arguments.pop("policy"), as_json=arguments.pop("json"), **arguments)


def _counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(name) for name in split_names(text)]
    except ValueError:
        raise UsageError(f"Expected whole numbers separated by commas, got {text!r}.") from None
