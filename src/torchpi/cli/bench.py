"""The commands `bench …`: measured times, compared with the floor of this machine."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from torchpi.cli.common import EpisodeOptions, Episodes
from torchpi.errors import UsageError
from torchpi.serving import require_extra
from torchpi.threads import spin_briefly


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure sampling and a training step, compared with the floor that this machine allows.

    In one run: the peak of a large matmul and of a large copy, then sampling or one training step. The floor of each
    operation is the larger of FLOPs / peak and bytes / bandwidth; the table says how it adds up. `bench load`, `bench
    data` and `bench serve`, with options of their own, measure loading, the training loader and a server.
    """

    what: Annotated[Literal["all", "model", "train"], tyro.conf.Positional] = "all"
    """model (sample_actions), train (one step), or all: both."""
    config: str = "mid"
    """Sizes of the model: mid (47 M parameters), a preset's name, or a JSON file. The weights are random."""
    batch: int = 1
    """Samples at once."""
    cameras: int = 3
    """Cameras of the observation."""
    prompt_tokens: int = 60
    """Valid tokens of the prompt; sampling drops the padding behind them."""
    num_steps: int = 10
    """Euler steps."""
    num_samples: int = 1
    """For model: chunks per observation, which share its prefix."""
    flow_samples_per_obs: int = 1
    """For train: pairs of noise and time per observation, which share one forward pass over the prefix."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matmuls; weights follow it in sampling, and stay float32 in training."""
    device: str = "cpu"
    """Device: cpu or cuda."""
    engine: Literal["compiled", "graph", "eager"] | None = None
    """For model: sample with an engine, through torch.compile, as a CUDA graph, or its operations as they are (eager);
    by default the plain model samples."""
    compile: bool = False
    """For train: run each layer through torch.compile."""
    busy: bool = False
    """For model: measure it once more while other processes keep all cores busy."""
    repeats: int = 5
    """Timed runs, whose median counts."""
    json: bool = False
    """Print one JSON document."""

    renamed: ClassVar = {
        "--draws": "--flow-samples-per-obs",
        "control": "a script of the repository: python benchmarks/control.py --help",
        "sim": "a script of the repository: python benchmarks/simulation.py --help",
    }

    def run(self) -> None:
        if self.what == "model":  # as infer and serve do
            spin_briefly()
        import torch

        from torchpi.bench.model import bench_config, run_bench
        from torchpi.model.operations import Workload

        sizes = bench_config(self.config), self.batch, self.cameras, self.prompt_tokens, self.num_steps
        work = Workload(*sizes, getattr(torch, self.dtype), self.device, self.flow_samples_per_obs, self.num_samples)
        names = ["model", "train"] if self.what == "all" else [self.what]
        if self.what == "model" and self.compile:
            raise UsageError("--compile is for training; bench model takes --engine compiled.")
        run_bench(
            names,
            work,
            engine=self.engine,
            compiled=self.compile,
            busy=self.busy,
            repeats=self.repeats,
            as_json=self.json,
        )


@dataclasses.dataclass(frozen=True)
class BenchLoad:
    """Measure loading a checkpoint, and writing its weights into a policy folder: time and memory.

    Each runs in a fresh process. The floor is the time to read the same bytes, and to write as many.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder or checkpoint."""
    config: str | None = None
    """Sizes of a checkpoint that does not say them: a preset's name or a JSON file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the loaded weights."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.bench.load import run_bench_load

        run_bench_load(self.policy, dtype=self.dtype, config=self.config, as_json=self.json)


@dataclasses.dataclass(frozen=True)
class BenchData:
    """Measure the training loader on a dataset: samples per second, and the time to decode a frame."""

    dataset: Annotated[str, tyro.conf.Positional]
    """A LeRobot dataset, a folder or hf://org/name."""
    config: str = "mid"
    """Sizes of the model: mid, a preset's name, or a JSON file."""
    embodiment: str | None = None
    """The dataset's robot, whose cameras are read; by default all cameras are."""
    batch: int = 32
    """Samples in a batch."""
    workers: int = 1
    """Processes that prepare samples; 0: this one does."""
    repeats: int = 5
    """Timed batches."""
    step_seconds: float | None = None
    """Duration of a training step; shows for which fraction of the time it would wait."""
    json: bool = False
    """Print one JSON document."""
    episodes: Episodes = EpisodeOptions()
    aliases: ClassVar = {"--episodes": "--select"}

    def run(self) -> None:
        from torchpi.bench.data import run_bench_data
        from torchpi.bench.model import bench_config

        arguments = vars(self) | {"config": bench_config(self.config), "as_json": self.json}
        for name in ("dataset", "episodes", "json"):
            del arguments[name]
        run_bench_data(self.dataset, **arguments, **self.episodes.reading_of(self.dataset))


@dataclasses.dataclass(frozen=True)
class BenchServe:
    """Measure the time that a policy server adds to the model's own, and whether many clients are served alike.

    The server, a minimal server (receive, infer, send) and the clients have processes of their own and talk over
    loopback; the model is a pause. Requests of one client go to both servers in turn; their round trips minus inference
    are compared. Then many clients send requests at once. With the defaults it takes about three minutes;
    `--runs 1 --requests 200 --seconds 5` is a quick look.
    """

    model_ms: float = 10.0
    """Duration of one forward pass of the model, in milliseconds."""
    runs: int = 5
    """Runs of the single client, whose medians count."""
    requests: int = 1000
    """Requests in each run, to either server."""
    clients: int = 16
    """Clients that send requests at once."""
    seconds: float = 60.0
    """Seconds for which they do so."""
    json: bool = False
    """Print one JSON document."""

    renamed: ClassVar = dict.fromkeys(
        ("--guided", "--pairs"), "a script of the repository: python benchmarks/guidance.py --help"
    )

    def run(self) -> None:
        require_extra()
        from torchpi.bench.serve import run_bench_serving

        arguments = dict(vars(self))
        run_bench_serving(as_json=arguments.pop("json"), **arguments)
