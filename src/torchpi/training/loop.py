"""The training loop: from a recipe and a dataset to a policy folder, in one process or many."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import torch
import torch._dynamo
import torch.distributed as dist

from torchpi.config import Pi0Config
from torchpi.engine.engine import PROMPT_LENGTHS
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.training.activation_checkpointing import checkpoint_activations, layers
from torchpi.training.checkpointer import Checkpointer, Exporter, check_torch
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import Parallel, World, parallelize, process_group, sum_over_processes
from torchpi.training.hooks import Holdout, Hook, LiveRun, draw_curves, log_metrics, save_checkpoint, stop_request
from torchpi.training.optim import clip_gradients, learning_rate, update_ema
from torchpi.training.report import REPORT, write_report
from torchpi.training.run_folder import begin_run, check_resumed, find_start, held_out_episodes, write_run_info
from torchpi.training.samples import Batch, Frames, SampleRng, Samples, TrainingOrder, loss_sum, num_loss_elements
from torchpi.training.setup import SourceData, build_policies, check_prompts, check_simulation, check_videos, open_data
from torchpi.training.state import STATE, TrainState, checkpoints
from torchpi.training.summary import print_summary, run_document, timestamp
from torchpi.training.trackers import Trackers, require_trackers
from torchpi.training.utilization import Utilization
from torchpi.training.weights import build_model, model_config, open_init, with_dtype
from torchpi.ui.progress import progress_bar
from torchpi.ui.tables import PlainConsole


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run."""

    policy: pathlib.Path
    """Policy folder of the last checkpoint."""
    step: int
    """Number of updates so far."""
    interrupted: bool
    """True if Ctrl-C or SIGTERM stopped the run before its last step; it can be resumed."""
    report: pathlib.Path
    """Path of the run's report.html."""


def train(config: TrainConfig, run: pathlib.Path, *, resume: bool = False) -> TrainResult:
    """Train a policy, or resume a run. Every process that torchrun started calls this function.

    Args:
        config: the recipe; `run_folder.resume_config` reads the recipe of a run to resume.
        run: the run folder: train.json (the recipe), metrics.jsonl, curves.png, report.html, checkpoints/<step>.
        resume: continue from the run's last checkpoint, as if the run had not been interrupted.

    Raises:
        FileNotFoundError: the dataset, or the run to resume, does not exist.
        KeyError: the dataset lacks a column or camera.
        ValueError: the run exists already; recipe, dataset and robot do not fit together; or the loss became NaN.
    """
    with process_group(config.device) as world:
        # Build the data, the model and the policies. Mistakes are found here, before anything is written.
        console = PlainConsole(stderr=True, quiet=not world.is_main)
        check_torch()
        require_trackers(config.trackers)
        config = with_dtype(config, world.device)
        last = find_start(config, run, resume=resume)
        first_step = int(last.name) if last else 0
        init = open_init(config)
        sizes = model_config(config, init)
        data = open_data(config, sizes, init, held_out=held_out_episodes(run) if last else None)
        model, init_report = build_model(config, sizes, init, skeleton=not world.is_main)
        policies = build_policies(config, model, data, init)
        check_simulation(config, policies[0])
        info = run_document(config, world, model, init_report, data)
        print_summary(console, config, model, info, data, policies, check_prompts(policies, data), first_step)
        order = TrainingOrder([source.frames for source in data], config, first_step, world.rank, world.size)
        if world.is_main:
            check_videos(data, console)
        if last:
            check_resumed(config, run, last, data, init_report, console)
        world.barrier()  # every process has read the run folder before the main process writes to it
        if world.is_main:
            begin_run(run, config, info, first_step)

        # Parallelize the model and load the last checkpoint. The exporter needs the frozen weights before sharding.
        export = Exporter(config, policies).write if world.is_main else None
        state, parallel = build_state(model, config, world)
        if last:
            state.load(last / STATE, first_step)
        checkpointer = Checkpointer(run, world, config.checkpoint, finish=export)

        # Train, with hooks that evaluate, save and log.
        try:
            names = config.trackers if world.is_main else ()
            with contextlib.closing(Trackers(names, run, dataclasses.asdict(config), first_step)) as trackers:
                epoch_frames = sum(len(source.frames) for source in data)
                components = (state, parallel, checkpointer, trackers, Utilization(model, config, world.device))
                live = LiveRun(config, run, world, *components, epoch_frames, resumed=last is not None)
                run_steps(live, data, policies, order)
            checkpointer.wait()
            if world.is_main:
                write_run_info(run, {**info, "finished": timestamp()})
        finally:
            checkpointer.close()
            report = write_report(run) if world.is_main else run / REPORT
        return TrainResult(checkpoints(run)[-1] / "policy", state.step, state.step < config.num_steps, report)


def run_steps(run: LiveRun, data: Sequence[SourceData], policies: Sequence[Policy], order: TrainingOrder) -> None:
    """Update the weights until the last step or a stop signal; call the hooks after each update."""
    config, world = run.config, run.world
    samples = _training_samples(config, data, policies)
    batches = samples.batches(order, config.data.workers, pinned=world.device.type == "cuda")
    hooks: list[Hook] = [log_metrics, save_checkpoint, Holdout(run, data, policies).after_step, draw_curves]
    bar = progress_bar("steps", config.num_steps, completed=run.state.step, shown=world.is_main)
    with stop_request() as stop_requested, bar as advance:
        while not run.complete and not run.stopped:
            with run.timed("data"):
                collated = [next(batches) for _ in range(config.grad_accum_steps)]
            for batch in collated:
                run.utilization.add(batch)
            with run.timed("update"):
                micro_batches = [samples.finish(batch, world.device) for batch in collated]
                with run.save_failed(micro_batches):
                    loss, run.numbers = update(run.state, config, micro_batches, run.parallel, world.size)
                total = sum_over_processes({"loss": loss, "stop": float(stop_requested())})
            run.losses.append(total["loss"])
            run.stopped = total["stop"] > 0  # a signal to one process stops all of them after the same update
            for hook in hooks:
                run.log(hook(run))
            advance(note=run.note)


def _training_samples(config: TrainConfig, data: Sequence[SourceData], policies: Sequence[Policy]) -> Samples:
    frames = [
        Frames(source.train, source.embodiment, policy.transforms)
        for source, policy in zip(data, policies, strict=True)
    ]
    rng = SampleRng(
        config.seed,
        config.optim.flow_samples_per_obs,
        state_noise=config.data.state_noise,
        augmentation=config.data.augmentation,
        max_action_prefix=config.optim.max_action_prefix,
    )
    return Samples(frames, rng, _prompt_lengths(policies[0].model.config) if config.model.compile else ())


def _prompt_lengths(sizes: Pi0Config) -> Sequence[int]:
    """Token counts that prompts are padded to, so that the compiled layers meet few shapes."""
    longest = sizes.max_token_len or max(PROMPT_LENGTHS)
    return sorted({min(length, longest) for length in PROMPT_LENGTHS} | {longest})


def build_state(model: Pi0, config: TrainConfig, world: World) -> tuple[TrainState, Parallel]:
    """Prepare a model for training, parallelize it, and create its training state."""
    checkpoint_activations(model, config.model.activation_checkpointing)
    if config.model.compile:
        compile_layers(model, fullgraph=config.parallel.strategy == "ddp")  # FSDP's hooks break the graph of a layer
    shard_size = config.parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parallel = parallelize(model, config.parallel.strategy, world, shard_size=shard_size)
    optim = config.optim
    state = TrainState.create(
        model, weight_decay=optim.weight_decay, ema=optim.ema_decay > 0, optimizer=optim.optimizer
    )
    return state, parallel


def compile_layers(model: Pi0, *, fullgraph: bool = True) -> None:
    """Compile the layers for static shapes, in place.

    Args:
        fullgraph: raise an error if a layer does not compile to a single graph.
    """
    # Both stacks share the layer's code, and each padded prompt length needs a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers(model):
        layer.compile(fullgraph=fullgraph, dynamic=False)


def update(
    state: TrainState, config: TrainConfig, batches: Sequence[Batch], parallel: Parallel, world_size: int = 1
) -> tuple[float, dict[str, float]]:
    """Update the weights and their EMA once, in openpi's order of operations.

    Args:
        batches: the micro-batches of this process.

    Returns:
        This process's share of the loss before the update (summed over all processes it is the mean over the whole
        batch), and the gradient norm before clipping ("grad_norm") with the learning rate ("lr").
    """
    optim = config.optim
    num_elements = _num_loss_elements(config, batches, world_size)
    loss = torch.zeros((), device=batches[0].actions.device)
    for i, batch in enumerate(batches):
        with parallel.sync_gradients(i == len(batches) - 1):
            micro_loss = loss_sum(parallel.forward, batch, optim.loss) / num_elements
            (micro_loss * world_size).backward()  # DDP and FSDP average the gradients over the processes
        loss += micro_loss.detach()
    grad_norm = clip_gradients(list(state.trainable.values()), optim.max_grad_norm)
    mean_loss = float(loss)  # no further wait for the device: clip_gradients has waited for the norm
    if not math.isfinite(grad_norm):
        state.optimizer.zero_grad()
        raise FloatingPointError(f"The gradient at step {state.step} has the norm {grad_norm} (loss {mean_loss:g}).")
    lr = learning_rate(state.step, optim, config.num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    if state.ema:
        update_ema(list(state.ema.values()), list(state.trainable.values()), optim.ema_decay)
    state.optimizer.zero_grad()  # frees the gradients' memory for the evaluation or the next forward pass
    state.step += 1
    return mean_loss, {"grad_norm": grad_norm, "lr": lr}


def _num_loss_elements(config: TrainConfig, batches: Sequence[Batch], world_size: int) -> float | torch.Tensor:
    """Number of loss elements over all micro-batches and processes; a tensor if they are counted on the device."""
    num_local = sum(num_loss_elements(batch, config.optim.loss) for batch in batches)
    if not isinstance(num_local, torch.Tensor):  # the same number in every process
        return float(num_local * world_size)
    if world_size > 1:
        dist.all_reduce(num_local)
    return num_local
