"""Training in several processes gives the same run as in one; checkpoints survive full disks and kills."""

import dataclasses
import errno
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from process_helpers import interruptible
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from train_helpers import SIZES, assert_same_bits, small_recipe, weights, write_dataset
from train_jobs import Job, resume, train_together

from torchpi.model.pi0 import Pi0
from torchpi.training import checkpointer as checkpointer_module
from torchpi.training import distributed, loop, state
from torchpi.training.config import CheckpointConfig
from torchpi.training.run_folder import METRICS, resume_config

STEPS = 4
FIGURES = ("loss", "grad_norm", "holdout_loss", "param_norm")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe with an action_dim that two processes can't shard evenly, and with evaluations between updates."""
    dataset = tmp_path_factory.mktemp("data") / "set"
    write_dataset(dataset)
    return small_recipe(
        dataset, dataclasses.replace(SIZES, action_dim=5), num_steps=STEPS, decay_steps=STEPS, flow_samples_per_obs=2,
        lr=1e-3, warmup_steps=2, eval_every=2, holdout_samples=6, save_every=2, log_every=1,
    )  # fmt: skip


def figures(run: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def without_key_biases(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop SigLIP's key biases: they have no effect, but AdamW turns rounding errors of their gradient into steps."""
    width = SIZES.siglip.width
    return {
        name: torch.cat([value[:width], value[2 * width :]]) if name.endswith("qkv.bias") else value
        for name, value in values.items()
    }


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Compare losses to 1e-5 and states to 2e-5, because AdamW divides by small moments."""
    for line, expected in zip(figures(one), figures(other), strict=True):
        names = [name for name in FIGURES if name in expected]
        assert line["step"] == expected["step"]
        assert [line[name] for name in names] == pytest.approx([expected[name] for name in names], rel=0, abs=1e-5)
    found, wanted = without_key_biases(weights(one)), without_key_biases(weights(other))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_fsdp_in_one_process_gives_the_same_run(recipe, tmp_path, dtype):
    """The run includes an evaluation, which swaps in the EMA weights while FSDP has gathered some of the weights."""
    plain = recipe.replace(dtype=dtype)
    loop.train(plain, tmp_path / "plain")
    loop.train(plain.replace(parallel="fsdp"), tmp_path / "fsdp")
    assert_same_run(tmp_path / "fsdp", tmp_path / "plain")


@pytest.mark.parametrize("pi05", [True, False])
def test_fsdp_gathers_only_matmul_weights_in_bfloat16(pi05):
    model = Pi0(dataclasses.replace(SIZES, pi05=pi05), device="meta", compute_dtype=torch.bfloat16)
    gathered = {id(p) for modules, _ in distributed.shard_groups(model) for m in modules for p in m.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in gathered}
    assert all(dtype is torch.bfloat16 for _, dtype in distributed.shard_groups(model))
    assert {"vision.blocks.0.fc1.bias", "backbone.layers.0.attention.qkv.weight"} <= names
    in_float32 = ("norm.scale", "norm1", "norm2", "vision.norm", "patch_embed", "pos_embed", "embedding", "suffix")
    assert not [name for name in names if any(part in name for part in (*in_float32, "action_out_proj"))]


def test_micro_batches_accumulate_in_ddp_buckets():
    """There is only one set of gradients, in the buckets that are reduced over the processes."""
    with distributed.process_group("cpu") as world:
        model = Pi0(SIZES)
        two_processes = dataclasses.replace(world, size=2)  # a run in one process would not use DistributedDataParallel
        parallel = distributed.parallelize(model, "ddp", two_processes, shard_size=1)
        parameter = model.action_out_proj.weight
        model.forward = lambda factor: factor * torch.stack([p.sum() for p in model.parameters()]).sum()
        for update in range(3):
            places = set()
            for factor, last in ((1.0, False), (2.0, False), (4.0, True)):
                with parallel.sync_gradients(last):
                    parallel.forward(factor).backward()
                places.add(parameter.grad.data_ptr())
            assert len(places) == 1, f"update {update}"
            assert all((p.grad == 7).all() for p in model.parameters())
            storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
            assert len(storages) < 5  # buckets
            for each in model.parameters():
                each.grad = None


RECIPES = {
    "all": {},
    "real": {"loss": "real"},
    "lora": {"finetune": "lora"},
    "expert": {"finetune": "expert"},
    "bfloat16": {"dtype": "bfloat16"},
}
"""Recipes to compare."""
STRATEGIES = {
    "ddp": {},
    "ddp, two micro-batches": {"grad_accum_steps": 2},
    "fsdp": {"parallel": "fsdp", "chunk_samples": 2},
    "fsdp, two micro-batches, layers": {"parallel": "fsdp", "grad_accum_steps": 2, "activation_checkpointing": "full"},
    "hybrid of one": {
        "parallel": "hybrid",
        "shard_size": 1,
        "grad_accum_steps": 2,
        "activation_checkpointing": "selective",
    },
    "hybrid of two": {"parallel": "hybrid", "shard_size": 2},
}
"""Strategies for two processes."""
CASES = [
    *(("all", how) for how in STRATEGIES),
    *((part, how) for part in ("real", "lora", "expert") for how in ("ddp", "fsdp")),
    ("lora", "fsdp, two micro-batches, layers"),
]
BFLOAT16 = [("bfloat16", how) for how in ("ddp", "fsdp", "fsdp, two micro-batches, layers", "ddp, two micro-batches")]
"""Compared among themselves: in bfloat16, halves of a batch are rounded differently than the whole batch."""


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """Folders of runs: each recipe in one process, each case in two processes, and runs stopped halfway."""
    root = tmp_path_factory.mktemp("runs")
    init = loop.train(recipe.replace(num_steps=1), root / "init").policy
    of_weights = recipe.replace(init=str(init), model=None)
    parts = {
        name: (of_weights if "finetune" in changes else recipe).replace(**changes) for name, changes in RECIPES.items()
    }
    for name, config in parts.items():
        loop.train(config, root / name)
    jobs = [Job(parts[part].replace(**STRATEGIES[how]), root / f"{part} {how}") for part, how in CASES + BFLOAT16]
    half = recipe.replace(num_steps=STEPS // 2)
    jobs.append(Job(half.replace(parallel="fsdp"), root / "half of two"))
    loop.train(half, root / "half of one")
    train_together(2, jobs, root / "jobs")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("part", "how"), CASES)
def test_two_processes_give_the_same_run_as_one(part, how, runs):
    assert_same_run(runs / f"{part} {how}", runs / part)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp, two micro-batches", "ddp"])
def test_fsdp_in_bfloat16_gives_the_same_run_as_ddp(strategy, runs):
    sharded = "fsdp" if strategy == "ddp" else "fsdp, two micro-batches, layers"
    assert_same_run(runs / f"bfloat16 {sharded}", runs / f"bfloat16 {strategy}")
    for line, expected in zip(figures(runs / f"bfloat16 {sharded}"), figures(runs / "bfloat16"), strict=True):
        for name in {"loss", "holdout_loss"} & set(expected):
            assert line[name] == pytest.approx(expected[name], rel=5e-4)


@pytest.mark.slow
def test_run_resumes_with_other_world_size_and_strategy(runs, recipe, tmp_path):
    copies = {}
    for name, half in (("same", "two"), ("ddp", "two"), ("alone", "two"), ("together", "one")):
        copies[name] = shutil.copytree(runs / f"half of {half}", tmp_path / name)

    def job(name: str, parallel: str) -> Job:
        config = resume_config(copies[name]).replace(num_steps=STEPS, parallel=parallel)
        return Job(config, copies[name], resume=True)

    train_together(2, [job("same", "fsdp"), job("ddp", "ddp"), job("together", "fsdp")], tmp_path / "jobs")
    alone = job("alone", "ddp")
    loop.train(alone.config, alone.run, resume=True)
    assert_same_bits(weights(copies["same"]), weights(runs / "all fsdp"))
    for run in copies.values():
        assert_same_run(run, runs / "all")


@pytest.mark.slow
def test_checkpoint_without_the_file_of_a_process_raises_error(runs, tmp_path):
    run = shutil.copytree(runs / "half of two", tmp_path / "run")
    (file,) = (state.checkpoints(run)[-1] / state.STATE).glob("shard-00001-*")
    file.unlink()
    config = resume_config(run).replace(num_steps=STEPS, parallel="ddp")
    message = r"can't be loaded: A file is missing .*Move the checkpoint .* elsewhere or delete it; --resume then"
    with pytest.raises(ValueError, match=message):
        loop.train(config, run, resume=True)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_stops_all_processes_after_the_same_update(recipe, tmp_path):
    """The signal goes to torchrun and all its processes, as from a terminal."""
    config = recipe.replace(num_steps=100_000, save_every=100_000, eval_every=100_000, parallel="fsdp")
    (tmp_path / "recipe.json").write_text(config.to_json())
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "torchpi.cli", "train", "--recipe", tmp_path / "recipe.json", "--out", run]
    with interruptible(*torchrun, *train) as process:
        deadline = time.monotonic() + 120
        while not (run / METRICS).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    (checkpoint,) = state.checkpoints(run)
    assert figures(run)[-1]["step"] == int(checkpoint.name)
    said = re.findall(r"interrupted after (\d+) steps; continue with: torchpi train --resume", out)
    assert set(said) == {str(int(checkpoint.name))}


def constant_state(value: float = 0.0) -> state.TrainState:
    """A state whose weights all have one value."""
    model = Pi0(SIZES)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return state.TrainState.create(model, weight_decay=0.0, ema=True)


def test_loaded_moments_and_step_are_on_the_device_of_the_weights():
    """The fused kernel does not check the device of the step. "meta" stands for a GPU."""
    model = Pi0(SIZES, device="meta")
    some = state.TrainState.create(model, weight_decay=0.0, ema=False)
    some._make_moments(3)
    devices = {value.device.type for moments in some.optimizer.state.values() for value in moments.values()}
    assert devices == {"meta"}


def checkpointer(run: pathlib.Path, world: distributed.World, finish: Callable[[pathlib.Path, int], None]):
    return checkpointer_module.Checkpointer(run, world, CheckpointConfig(), finish=finish)


def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    may_finish = threading.Event()
    with distributed.process_group("cpu") as world:
        some = constant_state(1.0)
        writing = checkpointer(tmp_path, world, lambda folder, step: may_finish.wait(60) and None)
        first = writing.save(some)  # returns before anything is written
        assert not first.exists()
        for part in some.trainable.values():
            part.data.fill_(2.0)
        some.step = 1
        may_finish.set()
        second = writing.save(some)
        assert first.exists()
        writing.close()
    for folder, value in ((first, 1.0), (second, 2.0)):
        arrays = state.StateArrays(folder / state.STATE)
        assert all((arrays.read(name) == value).all() for name in arrays.names if name.startswith("weights."))


@pytest.mark.parametrize("where", ["state", "policy"])
def test_full_disk_raises_error_at_the_next_save_and_leaves_no_files(where, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with distributed.process_group("cpu") as world, monkeypatch.context() as patch:
        writing = checkpointer(tmp_path, world, full if where == "policy" else lambda folder, step: None)
        some = constant_state()
        if where == "state":
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        target = writing.save(some)
        some.step = 1
        with pytest.raises(OSError, match="No space left on device") as caught:
            writing.save(some)
        assert caught.value.errno == errno.ENOSPC
        writing.close()
    assert not target.exists()
    assert not list(tmp_path.glob("checkpoints/.*"))


def test_large_state_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_FILE_BYTES", 50_000)
    with distributed.process_group("cpu") as world:
        some = constant_state(3.0)
        writing = checkpointer(tmp_path, world, lambda folder, step: None)
        target = writing.save(some)
        writing.close()
    assert len(list((target / state.STATE).iterdir())) > 3
    arrays = state.StateArrays(target / state.STATE)
    assert set(arrays.names) == set(some.tensors())
    assert all((arrays.read(name) == 3.0).all() for name in arrays.names)


@pytest.mark.slow
def test_killed_run_keeps_its_checkpoints_and_ends_with_the_same_bits(recipe, tmp_path):
    config = recipe.replace(num_steps=100_000, save_every=2, eval_every=100_000, keep=2, keep_every=10)
    run, rng = tmp_path / "run", random.Random(0)
    # Every process is a fork of a server that has imported torch, which saves the time of the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchpi.training.loop", "torchpi.sim.processes", "train_jobs"])
    seen: list[int] = []
    for number in range(24):
        process = context.Process(target=resume, args=(config, run))
        process.start()
        wait_for_kill_time(MOMENTS[number % len(MOMENTS)], process, run, seen, rng)
        process.kill()
        process.join()
        found = [int(path.name) for path in state.checkpoints(run)]
        for path in state.checkpoints(run):
            arrays = state.StateArrays(path / state.STATE)
            assert all(arrays.read(name).isfinite().all() for name in arrays.names)
        # Only old checkpoints are removed. At most the steps of two save intervals are lost: one save may be pending.
        assert set(seen) - set(found) == {step for step in seen if step not in found[-2:] and step % 10}
        assert max(line["step"] for line in complete_lines(run)) <= found[-1] + 2 * config.checkpoint.save_every
        seen = found
    ending = config.replace(num_steps=seen[-1] + 3)
    loop.train(ending, run, resume=True)
    loop.train(ending.replace(save_every=100_000), tmp_path / "whole")
    assert_same_bits(weights(run), weights(tmp_path / "whole"))
    assert [line["step"] for line in figures(run) if "loss" in line] == list(range(1, ending.num_steps + 1))
    saved = [*range(2, ending.num_steps, 2), ending.num_steps]
    assert [int(path.name) for path in state.checkpoints(run)] == [s for s in saved if s in saved[-2:] or s % 10 == 0]
    assert not list(run.rglob("*.tmp"))


MOMENTS = ("while it saves", "some time after a checkpoint", "while it saves", "some time after its start")


def wait_for_kill_time(
    moment: str, process: multiprocessing.Process, run: pathlib.Path, seen: list[int], rng: random.Random
) -> None:
    """Wait for the moment of the next kill."""
    deadline, folder = time.monotonic() + 120, run / state.CHECKPOINTS

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    if moment == "some time after its start":
        time.sleep(rng.uniform(0, 1))
        return
    newest = seen[-1] if seen else 0
    wait_for(lambda: bool(found := state.checkpoints(run)) and int(found[-1].name) > newest)
    if moment == "while it saves":
        wait_for(lambda: any(folder.glob(".0*.tmp")))
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 0.6))


def complete_lines(run: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without an incomplete last line."""
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines(keepends=True) if line[-1] == "\n"]
