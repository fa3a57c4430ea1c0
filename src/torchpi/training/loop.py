"""The training loop: one state, from the dataset to a policy folder, in one process or many."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from torchpi.errors import TrainingError
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.config import TrainConfig
from torchpi.training.curves import plot_curves
from torchpi.training.distributed import Parallel, World, parallelize, process_group, sum_over_processes
from torchpi.training.export import Exporter
from torchpi.training.holdout import Holdout
from torchpi.training.memory import checkpoint_activations, layers
from torchpi.training.metrics import METRICS, read_metrics, scalars
from torchpi.training.optim import clip_gradients, global_norm, learning_rate, update_ema
from torchpi.training.report import write_report
from torchpi.training.resume import (
    RUN,
    check_constant,
    check_data,
    find_start,
    held_out_episodes,
    replace_text,
    write_recipe,
)
from torchpi.training.samples import Batch, Draws, Frames, Samples, TrainingOrder, loss_sum, num_terms
from torchpi.training.setup import SourceData, build_policies, check_prompts, open_data
from torchpi.training.state import STATE, Checkpointer, TrainState, checkpoints
from torchpi.training.summary import describe, now, run_document
from torchpi.training.trackers import Tracker, open_trackers, require_trackers
from torchpi.training.weights import begin_model, model_config

CURVES = "curves.png"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    policy: pathlib.Path
    """The policy folder of the last checkpoint."""
    step: int
    interrupted: bool
    """It ended by Ctrl-C or SIGTERM and can be resumed."""
    report: pathlib.Path
    """The page about the run."""


def train(config: TrainConfig, run: pathlib.Path, *, resume: bool = False) -> TrainResult:
    """Train a policy, or go on with a run; in all processes that torchrun has started.

    Args:
        config: the recipe; of a run that is resumed, see `resume.resume_config`.
        run: the run's folder: train.json (the recipe), metrics.jsonl, curves.png, report.html, checkpoints/<step>.
        resume: go on from the run's last checkpoint, as if it had not been interrupted.

    Raises:
        FileNotFoundError: no dataset, or nothing to resume.
        KeyError: the dataset has no such column or camera.
        ValueError: the run exists already; recipe, dataset and robot do not fit together; or the loss became NaN.
    """
    with process_group(config.device) as world:
        console = Console(stderr=True, highlight=False, quiet=not world.first)
        last = find_start(config, run, resume=resume)
        sizes = model_config(config)
        data = open_data(config, sizes, held_out=None if last is None else held_out_episodes(run))
        model, beginning = begin_model(config, sizes, skeleton=not world.first)
        policies = build_policies(config, model, data)
        prompts: dict[str, int] = {}
        for policy, source in zip(policies, data, strict=True):
            prompts |= check_prompts(policy, source)
        describe(console, config, world, model, beginning, data, prompts)
        # What would end the run between its folder and its first step.
        training_order(config, data, world, int(last.name) if last is not None else 0)
        if world.first:
            _check_videos(data, console)
        require_trackers(config.trackers)
        if last is not None:
            check_data(last, data)
            if world.first and not check_constant(run, beginning.constant, config.model.init):
                console.print(f"{run / RUN} does not tell which weights the run does not change: they are not compared")
            complete = ", the last one: nothing to do" if int(last.name) == config.num_steps else ""
            console.print(f"going on from step {int(last.name)}{complete}")
        world.wait_for_all()  # all have looked at the run's folder before the first one writes there
        if world.first:
            write_recipe(config, run)
            if resume:
                _drop_metrics_behind(run / METRICS, int(last.name) if last is not None else 0)
        about = run_document(config, world, model, beginning, data)
        _write_about(run, world, about)
        exporter = Exporter(config, policies) if world.first else None
        state, parallel = spread(model, config, world)
        if last is not None:
            state.load(last / STATE, int(last.name))
        checkpointer = Checkpointer(
            run,
            world,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            finish=exporter.write if exporter else None,
        )
        trainer = _Trainer(config, run, world, policies, state, parallel, data, checkpointer)
        try:
            interrupted = trainer.run(console)
            checkpointer.wait()
            _write_about(run, world, {**about, "finished": now()})
        finally:
            checkpointer.close()
            report = write_report(run) if world.first else run / "report.html"
        return TrainResult(checkpoints(run)[-1] / "policy", state.step, interrupted, report)


def _check_videos(data: Sequence[SourceData], console: Console) -> None:
    """Find a video that is too short now, and not hours later."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for dataset in (part for source in data for part in (source.train, source.holdout) if part is not None):
            task = progress.add_task(f"videos of {dataset.path.name}", total=None)

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            dataset.check_videos(show)


def training_order(config: TrainConfig, data: Sequence[SourceData], world: World, first_step: int) -> TrainingOrder:
    """The places of a process' passes from a step on."""
    return TrainingOrder(
        [source.frames for source in data],
        [source.source.weight for source in data],
        config.batch_size,
        config.grad_accum_steps,
        config.seed,
        first_step,
        config.num_steps,
        world.rank,
        world.size,
    )


def spread(model: Pi0, config: TrainConfig, world: World) -> tuple[TrainState, Parallel]:
    """A model, prepared for training as the recipe says and spread over the processes, and its state."""
    checkpoint_activations(model, config.model.activation_checkpointing)
    if config.model.compile:
        for layer in layers(model):
            layer.compile()
    shard_size = config.parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parallel = parallelize(model, config.parallel.strategy, world, shard_size=shard_size)
    state = TrainState.begin(
        model, weight_decay=config.optim.weight_decay, ema=config.optim.ema_decay > 0, optimizer=config.optim.optimizer
    )
    return state, parallel


def _write_about(run: pathlib.Path, world: World, about: Mapping[str, Any]) -> None:
    if world.first:
        replace_text(run / RUN, f"{json.dumps(about, indent=2, ensure_ascii=False)}\n")


def _drop_metrics_behind(path: pathlib.Path, step: int) -> None:
    """The interrupted run may have got further than its last checkpoint."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))


def update(
    state: TrainState, config: TrainConfig, batches: Sequence[Batch], parallel: Parallel, world_size: int = 1
) -> tuple[torch.Tensor, dict[str, float]]:
    """One update of the weights and of their average, in the order of the original.

    Args:
        batches: of this process, one per pass.

    Returns:
        This process' part of the loss before the update, still on the device: the sum over all processes is the mean
        over the whole batch; the norm of the gradient before it is cut; the learning rate.
    """
    rate = learning_rate(
        state.step,
        peak=config.optim.lr,
        warmup_steps=config.optim.warmup_steps,
        decay_steps=config.optim.decay_steps or config.num_steps,
        final=config.optim.min_lr,
        schedule=config.optim.lr_schedule,
        timescale=config.optim.timescale,
    )
    total = _num_terms(config, batches, world_size)
    loss = torch.zeros((), device=batches[0].actions.device)
    for number, batch in enumerate(batches):
        with parallel.last_of_update(number == len(batches) - 1):
            part = loss_sum(parallel.forward, batch, config.optim.loss) / total
            (part * world_size).backward()  # the gradients of the processes are averaged
        loss += part.detach()
    state.take_gradients()
    grad_norm = clip_gradients(list(state.trained.values()), config.optim.max_grad_norm)
    if not math.isfinite(grad_norm):
        state.drop_gradients()
        raise FloatingPointError(f"The gradient at step {state.step} has the norm {grad_norm} (loss {loss.item():g}).")
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    if state.ema:
        update_ema(list(state.ema.values()), list(state.parts.values()), config.optim.ema_decay)
    state.drop_gradients()  # whatever follows, a measurement or the next forward pass, has their memory
    state.step += 1
    return loss, {"grad_norm": grad_norm, "lr": rate}


def _num_terms(config: TrainConfig, batches: Sequence[Batch], world_size: int) -> float:
    """Of the whole batch, over all passes and processes."""
    own = sum(num_terms(batch, config.optim.loss) for batch in batches)
    if config.optim.loss == "all" and not config.optim.max_action_prefix:  # the same in each
        return float(own * world_size)
    return sum_over_processes({"terms": float(own)})["terms"]


class _Trainer:
    """The loop over the updates; what it needs between them is in `state`."""

    def __init__(
        self,
        config: TrainConfig,
        run: pathlib.Path,
        world: World,
        policies: Sequence[Policy],
        state: TrainState,
        parallel: Parallel,
        data: Sequence[SourceData],
        checkpointer: Checkpointer,
    ) -> None:
        self.config, self.run_folder, self.world = config, run, world
        self.state, self.parallel, self.checkpointer = state, parallel, checkpointer
        draws = Draws(
            config.seed,
            config.optim.flow_samples_per_obs,
            config.data.state_noise,
            config.data.augmentation,
            config.optim.max_action_prefix,
        )
        frames = [
            Frames(source.train, source.embodiment, policy.transforms, source.source.prompt)
            for source, policy in zip(data, policies, strict=True)
        ]
        self.samples = Samples(frames, draws)
        self.batches = self.samples.batches(training_order(config, data, world, state.step), config.data.workers)
        self.holdout = Holdout(config, world, data, policies)
        self.resumed = state.step > 0
        self.epoch_frames = sum(len(source.frames) for source in data)
        names = config.trackers if world.first else ()
        self.tracker: Tracker = open_trackers(names, run, dataclasses.asdict(config), state.step)

    def run(self, console: Console) -> bool:
        """Update until the last step; whether a signal ended it before."""
        config, state = self.config, self.state
        columns = (
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        meter = _Meter(self.world)
        with contextlib.closing(self.tracker), _StopRequest() as stop, Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=config.num_steps, completed=state.step)
            while state.step < config.num_steps and not meter.stopped:
                with meter.waiting():
                    prepared = [next(self.batches) for _ in range(config.grad_accum_steps)]
                batches = [self.samples.finish(batch, self.world.device) for batch in prepared]
                numbers = self._update(batches, meter, stop)
                complete = state.step == config.num_steps
                last = complete or meter.stopped
                if state.step % config.log_every == 0 or last:
                    line = meter.line(config.batch_size) | numbers | self._about_state()
                    progress.update(bar, description=_description(line))
                    self._log(line)  # before the checkpoint behind which a run may be gone on with
                with meter.paused():
                    if state.step % config.checkpoint.save_every == 0 or last:
                        self._log(self._save(last=last, simulate=not meter.stopped))
                    if state.step % config.eval.eval_every == 0 or complete:  # not where somebody waits for the end
                        self._log(self._measure())
                    if self.world.first and state.step % config.checkpoint.save_every == 0:
                        plot_curves(self.run_folder / METRICS, self.run_folder / CURVES)
                progress.update(bar, completed=state.step)
        if self.world.first:
            plot_curves(self.run_folder / METRICS, self.run_folder / CURVES)
        return state.step < config.num_steps

    def _update(self, batches: Sequence[Batch], meter: "_Meter", stop: "_StopRequest") -> dict[str, float]:
        try:
            loss, numbers = update(self.state, self.config, batches, self.parallel, self.world.size)
        except FloatingPointError as error:
            files = [self._keep_for_a_look(batch, i) for i, batch in enumerate(batches)]
            raise TrainingError(
                f"{error}; nothing of this step is kept. What it was computed from is in "
                f"{', '.join(map(str, files))}. Lower the learning rate, or look for extreme values: torchpi stats."
            ) from error
        meter.add(float(loss), stop.requested)
        return numbers

    def _keep_for_a_look(self, batch: Batch, number: int) -> pathlib.Path:
        name = f"failed_step_{self.state.step:08d}_process_{self.world.rank}_pass_{number}.safetensors"
        tensors = {key: value.detach().cpu().contiguous() for key, value in batch.to_tensors().items()}
        safetensors.torch.save_file(tensors, self.run_folder / name)
        return self.run_folder / name

    def _about_state(self) -> dict[str, float]:
        norm = global_norm([part for name, part in self.state.trained.items() if _counts_in_norm(name, part)])
        about = {
            "param_norm": float(norm),
            "epoch": self.state.step * self.config.batch_size / self.epoch_frames,
        }
        if self.world.device.type == "cuda":
            about["memory"] = float(torch.cuda.max_memory_allocated(self.world.device))
        return about

    def _measure(self) -> dict[str, Any]:
        """With the averaged weights, on the held-out episodes."""
        with self.state.averaged_weights() as model:
            model.eval()
            numbers: dict[str, Any] = self.holdout.loss(self.parallel.forward)
            chunks, pictures = self.holdout.chunks(self.run_folder, self.state.step)
            model.train()
        for name, path in pictures.items():
            self.tracker.picture(self.state.step, name, path)
        return numbers | chunks

    def _save(self, *, last: bool, simulate: bool) -> dict[str, Any]:
        target = self.checkpointer.save(self.state)
        simulate = simulate and self.config.eval.env is not None
        if last or simulate:
            self.checkpointer.wait()
        if not simulate:
            return {}
        success = self._try_in_simulator(target / "policy") if self.world.first else {}
        self.world.wait_for_all()  # a collective of the training does not wait for so long
        return success

    def _try_in_simulator(self, policy: pathlib.Path) -> dict[str, Any]:
        from torchpi.sim.evaluate import evaluate  # brings the simulator

        assert self.config.eval.env is not None
        tasks = None if self.config.eval.env_tasks is None else self.config.eval.env_tasks.split(",")
        result = evaluate(
            str(policy),
            self.config.eval.env,
            tasks=tasks,
            episodes=self.config.eval.env_episodes,
            seed=self.config.seed,
        ).to_dict()
        return {"success_rate": result["success_rate"], "success": result["tasks"]}

    def _log(self, values: dict[str, Any]) -> None:
        if self.world.first and values:
            line = {"step": self.state.step, **values} | ({"resumed": True} if self.resumed else {})
            self.resumed = False
            with (self.run_folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.tracker.log(self.state.step, scalars(line))


def _counts_in_norm(name: str, parameter: torch.Tensor) -> bool:
    """openpi's param_norm is of the kernels."""
    return parameter.ndim > 1 and name not in ("embedding", "vision.pos_embed")


def _description(line: dict[str, Any]) -> str:
    return (
        f"loss {line['loss']:.4f}, gradient {line['grad_norm']:.2f}, rate {line['lr']:.0e}, "
        f"{line['samples_per_second']:.3g}/s, {100 * line['data_wait']:.0f} % waiting"
    )


class _Meter:
    """The mean loss and the speed since the last line."""

    def __init__(self, world: World) -> None:
        self.world, self.stopped = world, False
        self._restart()

    def _restart(self) -> None:
        self.since, self.waited, self.losses = time.perf_counter(), 0.0, list[float]()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the next batch is waited for."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While something is done that is no part of an update."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, loss: float, stop: bool) -> None:
        """The loss of an update, of this process; all of them stop where one is asked to."""
        total = sum_over_processes({"loss": loss, "stop": float(stop)})
        self.losses.append(total["loss"])
        self.stopped = total["stop"] > 0

    def line(self, batch_size: int) -> dict[str, float]:
        """What has been measured since the last one."""
        seconds = time.perf_counter() - self.since
        line = {
            "loss": sum(self.losses) / len(self.losses),
            "samples_per_second": round(batch_size * len(self.losses) / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
        }
        self._restart()
        return line


class _StopRequest(contextlib.AbstractContextManager["_StopRequest"]):
    """While it is open, the first Ctrl-C or SIGTERM asks to stop after the current update; a second Ctrl-C interrupts
    as usual."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopRequest":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
