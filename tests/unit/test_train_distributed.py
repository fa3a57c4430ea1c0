"""Training in several processes, and what is saved: the same numbers, to the bit or to 2e-5; and nothing gets lost."""

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
from train_helpers import SIZES, assert_same_bits, weights, write_dataset
from train_jobs import Job, resume, train_together

from torchpi.model.pi0 import Pi0
from torchpi.training import checkpointer as checkpointer_module
from torchpi.training import distributed, loop, state
from torchpi.training.config import CheckpointConfig, TrainConfig
from torchpi.training.run_folder import METRICS, resume_config

STEPS = 4
FIGURES = ("loss", "grad_norm", "holdout_loss", "param_norm")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """With an action_dim that two processes can't share evenly, and measurements between the updates."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "set")
    (folder / "model.json").write_text(json.dumps(dataclasses.replace(SIZES, action_dim=5).to_dict()))
    return TrainConfig(
        dataset=str(folder / "set"),
        embodiment="metaworld",
        model=str(folder / "model.json"),
        num_steps=STEPS,
        decay_steps=STEPS,
        batch_size=4,
        flow_samples_per_obs=2,
        lr=1e-3,
        warmup_steps=2,
        ema_decay=0.5,
        dtype="float32",
        eval_every=2,
        holdout_samples=6,
        save_every=2,
        log_every=1,
        chunk_samples=0,
        trackers=(),
        workers=0,
    )


def figures(run: pathlib.Path) -> list[dict[str, float]]:
    """The losses of each step."""
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def without_key_biases(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's key biases change nothing: their gradient is rounding, and AdamW makes steps of full size of it."""
    width = SIZES.siglip.width
    return {
        name: torch.cat([value[:width], value[2 * width :]]) if name.endswith("qkv.bias") else value
        for name, value in values.items()
    }


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Losses, to 1e-5, and state, to 2e-5: AdamW divides by small moments."""
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
def test_shards_in_one_process_give_the_same_run(recipe, tmp_path, dtype):
    """Including an evaluation with EMA weights, which swaps the weights while FSDP has gathered some. In bfloat16 FSDP
    gathers in bfloat16, except the parameters used in float32."""
    plain = recipe.replace(dtype=dtype)
    loop.train(plain, tmp_path / "plain")
    loop.train(plain.replace(parallel="fsdp"), tmp_path / "fsdp")
    assert_same_run(tmp_path / "fsdp", tmp_path / "plain")


@pytest.mark.parametrize("pi05", [True, False])
def test_bfloat16_is_gathered_where_it_is_multiplied_and_nowhere_else(pi05):
    model = Pi0(dataclasses.replace(SIZES, pi05=pi05), device="meta", compute_dtype=torch.bfloat16)
    gathered = {id(p) for modules, _ in distributed.shard_groups(model) for m in modules for p in m.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in gathered}
    assert all(dtype is torch.bfloat16 for _, dtype in distributed.shard_groups(model))
    assert {"vision.blocks.0.fc1.bias", "backbone.layers.0.attention.qkv.weight"} <= names
    in_float32 = ("norm.scale", "norm1", "norm2", "vision.norm", "patch_embed", "pos_embed", "embedding", "suffix")
    assert not [name for name in names if any(part in name for part in (*in_float32, "action_out_proj"))]


def test_micro_batches_add_up_in_the_buckets_of_ddp():
    """One set of gradients, from the first pass on: those that are summed over the processes."""
    with distributed.process_group("cpu") as alone:
        model = Pi0(SIZES)
        several = dataclasses.replace(alone, size=2)  # DistributedDataParallel is left out of a run in one process
        spread = distributed.parallelize(model, "ddp", several, shard_size=1)
        parameter = model.action_out_proj.weight
        model.forward = lambda factor: factor * torch.stack([p.sum() for p in model.parameters()]).sum()
        for update in range(3):
            places = set()
            for factor, last in ((1.0, False), (2.0, False), (4.0, True)):
                with spread.sync_gradients(last):
                    spread.forward(factor).backward()
                places.add(parameter.grad.data_ptr())
            assert len(places) == 1, f"update {update}"
            assert all((p.grad == 7).all() for p in model.parameters())
            storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
            assert len(storages) < 5  # buckets
            for each in model.parameters():
                each.grad = None


PARTS = {
    "all": {},
    "real": {"loss": "real"},
    "lora": {"finetune": "lora"},
    "expert": {"finetune": "expert"},
    "bfloat16": {"dtype": "bfloat16"},
}
"""Recipes to compare."""
SPREAD = {
    "ddp": {},
    "ddp, two passes": {"grad_accum_steps": 2},
    "fsdp": {"parallel": "fsdp", "chunk_samples": 2},
    "fsdp, two passes, layers": {"parallel": "fsdp", "grad_accum_steps": 2, "activation_checkpointing": "full"},
    "hybrid of one": {
        "parallel": "hybrid",
        "shard_size": 1,
        "grad_accum_steps": 2,
        "activation_checkpointing": "selective",
    },
    "hybrid of two": {"parallel": "hybrid", "shard_size": 2},
}
"""Strategies over two processes."""
CASES = [
    *(("all", how) for how in SPREAD),
    *((part, how) for part in ("real", "lora", "expert") for how in ("ddp", "fsdp")),
    ("lora", "fsdp, two passes, layers"),
]
BFLOAT16 = [("bfloat16", how) for how in ("ddp", "fsdp", "fsdp, two passes, layers", "ddp, two passes")]
"""Half a batch is rounded otherwise than a whole one, so these are compared among themselves."""


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """Folders: of each part a run in one process, and of each case one in two; and halves of a run."""
    root = tmp_path_factory.mktemp("runs")
    init = loop.train(recipe.replace(num_steps=1), root / "init").policy
    of_weights = recipe.replace(init=str(init), model=None)
    parts = {
        name: (of_weights if "finetune" in changes else recipe).replace(**changes) for name, changes in PARTS.items()
    }
    for name, config in parts.items():
        loop.train(config, root / name)
    jobs = [Job(parts[part].replace(**SPREAD[how]), root / f"{part} {how}") for part, how in CASES + BFLOAT16]
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
@pytest.mark.parametrize("passes", ["ddp, two passes", "ddp"])
def test_shards_in_bfloat16_give_the_same_run_as_whole_weights(passes, runs):
    sharded = "fsdp" if passes == "ddp" else "fsdp, two passes, layers"
    assert_same_run(runs / f"bfloat16 {sharded}", runs / f"bfloat16 {passes}")
    for line, expected in zip(figures(runs / f"bfloat16 {sharded}"), figures(runs / "bfloat16"), strict=True):
        for name in {"loss", "holdout_loss"} & set(expected):
            assert line[name] == pytest.approx(expected[name], rel=5e-4)


@pytest.mark.slow
def test_run_resumes_on_another_number_of_processes_and_strategy(runs, recipe, tmp_path):
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
def test_a_checkpoint_without_the_file_of_one_process_is_an_error(runs, tmp_path):
    run = shutil.copytree(runs / "half of two", tmp_path / "run")
    (file,) = (state.checkpoints(run)[-1] / state.STATE).glob("shard-00001-*")
    file.unlink()
    config = resume_config(run).replace(num_steps=STEPS, parallel="ddp")
    message = r"can't be loaded: A file is missing .*Move the checkpoint .* elsewhere or delete it; --resume then"
    with pytest.raises(ValueError, match=message):
        loop.train(config, run, resume=True)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_stops_all_processes_after_the_same_update(recipe, tmp_path):
    """As a terminal sends it: to torchrun and to all that it has started."""
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


def begin(value: float = 0.0) -> state.TrainState:
    """A state whose weights are all one number."""
    model = Pi0(SIZES)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return state.TrainState.create(model, weight_decay=0.0, ema=True)


def test_loaded_moments_are_on_the_optimizers_device():
    """All of them, the step included: the fused kernel does not look where it is. "meta" stands for a GPU."""
    model = Pi0(SIZES, device="meta")
    some = state.TrainState.create(model, weight_decay=0.0, ema=False)
    some._make_moments(3)
    devices = {value.device.type for moments in some.optimizer.state.values() for value in moments.values()}
    assert devices == {"meta"}


def checkpointer(run: pathlib.Path, world: distributed.World, finish: Callable[[pathlib.Path, int], None]):
    return checkpointer_module.Checkpointer(run, world, CheckpointConfig(), finish=finish)


def test_training_continues_while_one_checkpoint_at_a_time_is_written(tmp_path):
    goes_on = threading.Event()
    with distributed.process_group("cpu") as world:
        some = begin(1.0)
        writing = checkpointer(tmp_path, world, lambda folder, step: goes_on.wait(60) and None)
        first = writing.save(some)  # comes back, although the disk has taken nothing yet
        assert not first.exists()
        for part in some.trainable.values():
            part.data.fill_(2.0)
        some.step = 1
        goes_on.set()
        second = writing.save(some)
        assert first.exists()
        writing.close()
    for folder, value in ((first, 1.0), (second, 2.0)):
        arrays = state.StateArrays(folder / state.STATE)
        assert all((arrays.read(name) == value).all() for name in arrays.names if name.startswith("weights."))


@pytest.mark.parametrize("where", ["state", "policy"])
def test_a_full_disk_is_an_error_at_the_next_save_and_nothing_is_left(where, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with distributed.process_group("cpu") as world, monkeypatch.context() as patch:
        writing = checkpointer(tmp_path, world, full if where == "policy" else lambda folder, step: None)
        some = begin()
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


def test_large_states_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer_module, "_FILE_BYTES", 50_000)
    with distributed.process_group("cpu") as world:
        some = begin(3.0)
        writing = checkpointer(tmp_path, world, lambda folder, step: None)
        target = writing.save(some)
        writing.close()
    assert len(list((target / state.STATE).iterdir())) > 3
    arrays = state.StateArrays(target / state.STATE)
    assert set(arrays.names) == set(some.tensors())
    assert all((arrays.read(name) == 3.0).all() for name in arrays.names)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_no_checkpoint_and_the_run_ends_with_the_same_bits(recipe, tmp_path):
    config = recipe.replace(num_steps=100_000, save_every=2, eval_every=100_000, keep=2, keep_every=10)
    run, rng = tmp_path / "run", random.Random(0)
    # Torch is imported once; each process is a fork of one that has computed nothing yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchpi.training.loop", "torchpi.sim.processes", "train_jobs"])
    seen: list[int] = []
    for number in range(24):
        process = context.Process(target=resume, args=(config, run))
        process.start()
        wait_for_the_moment(MOMENTS[number % len(MOMENTS)], process, run, seen, rng)
        process.kill()
        process.join()
        found = [int(path.name) for path in state.checkpoints(run)]
        for path in state.checkpoints(run):
            arrays = state.StateArrays(path / state.STATE)
            assert all(arrays.read(name).isfinite().all() for name in arrays.names)
        # None is gone but by rule, and no more steps than since the last two saves, of which one may be under way.
        assert set(seen) - set(found) == {step for step in seen if step not in found[-2:] and step % 10}
        assert max(line["step"] for line in figures_before_a_kill(run)) <= found[-1] + 2 * config.checkpoint.save_every
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


def wait_for_the_moment(
    moment: str, process: multiprocessing.Process, run: pathlib.Path, seen: list[int], rng: random.Random
) -> None:
    """Until the next kill is due."""
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


def figures_before_a_kill(run: pathlib.Path) -> list[dict[str, float]]:
    """Without a last line that was cut short."""
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines(keepends=True) if line[-1] == "\n"]
