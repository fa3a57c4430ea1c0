"""The bench commands: measured times compared with this machine's lower bound, the floor."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro

from torchpi.cli.common import EpisodeOptions, Episodes, Json
from torchpi.errors import UsageError
from torchpi.serving import require_extra
from torchpi.threads import spin_briefly


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure sampling and a training step, and compare them with the floor of this machine.

    The same run measures the machine's peak with a large matmul and its bandwidth with a large copy. The floor of each
    operation is the larger of FLOPs / peak and bytes / bandwidth; a table shows the floor per operation.

    `bench load`, `bench data` and `bench serve` measure checkpoint loading, the training loader and a policy server.
    """

    what: Annotated[Literal["all", "model", "train"], tyro.conf.Positional] = "all"
    """Workload: model (sample_actions), train (one training step), or all (both)."""
    config: str = "mid"
    """Model config: mid (47 M parameters), a preset name, or a JSON file. Weights are random."""
    batch: int = 1
    """Batch size."""
    cameras: int = 3
    """Number of cameras."""
    prompt_tokens: int = 60
    """Number of valid prompt tokens; sampling drops the padding after them."""
    num_steps: int = 10
    """Number of Euler steps."""
    num_samples: int = 1
    """For model: number of chunks per observation; they share its prefix."""
    flow_samples_per_obs: int = 1
    """For train: number of (noise, time) pairs per observation; they share one forward pass over the prefix."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Matmul dtype. Weights have the same dtype for sampling, and are float32 for training."""
    device: str = "cpu"
    """Device: cpu or cuda."""
    engine: Literal["compiled", "graph", "eager"] | None = None
    """For model: inference engine (eager: its plain operations); by default the plain model without an engine."""
    compile: bool = False
    """For train: compile each layer with torch.compile."""
    busy: bool = False
    """For model: measure a second time while other processes keep all CPU cores busy."""
    repeats: int = 5
    """Number of timed runs; the median is reported."""
    json: Json = False

    renamed: ClassVar = {
        "--draws": "--flow-samples-per-obs",
        "control": "a script in the repository: python benchmarks/control.py --help",
        "sim": "a script in the repository: python benchmarks/simulation.py --help",
    }

    def run(self) -> None:
        if self.what == "model":  # as infer and serve do
            spin_briefly()
        import torch

        from torchpi.bench.model import bench_config, run_bench
        from torchpi.model.operations import Workload

        work = Workload(
            bench_config(self.config),
            self.batch,
            self.cameras,
            self.prompt_tokens,
            self.num_steps,
            getattr(torch, self.dtype),
            self.device,
            self.flow_samples_per_obs,
            self.num_samples,
        )
        if self.what == "model" and self.compile:
            raise UsageError("--compile is for training; use --engine compiled with bench model.")
        run_bench(
            ["model", "train"] if self.what == "all" else [self.what],
            work,
            engine=self.engine,
            compiled=self.compile,
            busy=self.busy,
            repeats=self.repeats,
            as_json=self.json,
        )


@dataclasses.dataclass(frozen=True)
class BenchLoad:
    """Measure time and memory of loading a checkpoint, and of converting it to a policy folder.

    Each runs in a fresh process. The floor is the time to read the same bytes and, for converting, to write as many.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """Policy folder or checkpoint."""
    config: str | None = None
    """Model config, a preset name or a JSON file, for a checkpoint that does not state all sizes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the loaded weights."""
    json: Json = False

    def run(self) -> None:
        from torchpi.bench.load import run_bench_load

        run_bench_load(self.policy, dtype=self.dtype, config=self.config, as_json=self.json)


@dataclasses.dataclass(frozen=True)
class BenchData:
    """Measure the training data loader on a dataset: samples per second, and time to decode a frame."""

    dataset: Annotated[str, tyro.conf.Positional]
    """LeRobot dataset: a folder, or hf://org/name."""
    config: str = "mid"
    """Model config: mid, a preset name, or a JSON file."""
    embodiment: str | None = None
    """Robot whose cameras to read; by default all cameras of the dataset."""
    batch: int = 32
    """Batch size."""
    workers: int = 1
    """Number of loader processes; 0 loads in the main process."""
    repeats: int = 5
    """Number of timed batches."""
    step_seconds: float | None = None
    """Duration of a training step in seconds; reports the fraction of time that training would wait for data."""
    json: Json = False
    episodes: Episodes = EpisodeOptions()
    aliases: ClassVar = {"--episodes": "--select"}

    def run(self) -> None:
        from torchpi.bench.data import run_bench_data
        from torchpi.bench.model import bench_config

        run_bench_data(
            self.dataset,
            embodiment=self.embodiment,
            config=bench_config(self.config),
            batch=self.batch,
            workers=self.workers,
            repeats=self.repeats,
            step_seconds=self.step_seconds,
            as_json=self.json,
            **self.episodes.episode_args(self.dataset),
        )


@dataclasses.dataclass(frozen=True)
class BenchServe:
    """Measure the overhead of a policy server, and whether it serves many clients fairly.

    The policy server, a minimal server (receive, infer, send) and the clients run in separate processes and communicate
    over loopback; the model is replaced by a pause. One client sends requests to both servers in turn, and the round
    trips minus inference are compared. Then many clients send requests at once. The defaults take about three minutes;
    for a quick run use `--runs 1 --requests 200 --seconds 5`.
    """

    model_ms: float = 10.0
    """Duration of one inference, in milliseconds."""
    runs: int = 5
    """Number of single-client runs; medians are reported."""
    requests: int = 1000
    """Number of requests per run to each server."""
    clients: int = 16
    """Number of concurrent clients in the load test."""
    seconds: float = 60.0
    """Duration of the load test, in seconds."""
    json: Json = False

    renamed: ClassVar = dict.fromkeys(
        ("--guided", "--pairs"), "a script in the repository: python benchmarks/guidance.py --help"
    )

    def run(self) -> None:
        require_extra()
        from torchpi.bench.serve import run_bench_serving

        options = dict(vars(self))
        run_bench_serving(as_json=options.pop("json"), **options)
