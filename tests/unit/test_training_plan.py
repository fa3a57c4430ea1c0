"""The estimated memory of a run, compared with the measured memory."""

import dataclasses
import gc
import importlib.util
import json
import pathlib
import random

import pytest
import torch
import train_helpers
from torch.profiler import ProfilerActivity, profile

from torchpi.cli import main
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.training import loop
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import update
from torchpi.training.plan import plan
from torchpi.training.samples import example_batch, loss_sum
from torchpi.training.state import TrainState
from torchpi.training.weights import build_model

BASE = "gs://openpi-assets/checkpoints/pi05_base"  # only named: nothing is read, because the recipe has the sizes
GEMMA = GemmaConfig(width=128, depth=2, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=32)
SIZES = Pi0Config(
    pi05=True,
    paligemma_variant=GEMMA,
    action_expert_variant=dataclasses.replace(GEMMA, width=64, mlp_dim=256),
    siglip_variant=VisionConfig(width=96, depth=2, mlp_dim=256, num_heads=4, patch=14),
    action_dim=7,
    action_horizon=16,
    max_token_len=40,
    vocab_size=2048,
    image_size=56,
)


TINY_GEMMA = dataclasses.replace(GEMMA, width=16, depth=1, mlp_dim=32, head_dim=8)
TINY = dataclasses.replace(
    SIZES,
    paligemma_variant=TINY_GEMMA,
    action_expert_variant=TINY_GEMMA,
    siglip_variant=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
    vocab_size=64,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe(tmp_path_factory.mktemp("sizes"), SIZES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return recipe(tmp_path_factory.mktemp("tiny"), TINY)


def recipe(folder: pathlib.Path, sizes: Pi0Config) -> TrainConfig:
    (folder / "model.json").write_text(json.dumps(sizes.to_dict()))
    return TrainConfig(
        embodiment="metaworld", model=str(folder / "model.json"), batch_size=8, holdout_samples=8, dtype="bfloat16"
    )


def measured(config: TrainConfig, sizes: Pi0Config) -> int:
    """Peak of the memory that PyTorch allocates on the CPU in two updates and an evaluation, in bytes."""
    device = torch.device("cpu")
    gc.collect()  # memory of other tests must not be freed during the measurement
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, _ = build_model(config, sizes, skeleton=True)
        model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        checkpoint_activations(model, config.model.activation_checkpointing)
        state = TrainState.create(
            model, weight_decay=0.0, ema=config.optim.ema_decay > 0, optimizer=config.optim.optimizer
        )
        samples, cameras = config.batch_size // config.grad_accum_steps, ("base", "wrist")
        shape = (config.eval.holdout_samples, len(cameras), sizes.image_size, sizes.image_size, 3)
        held_out = torch.empty(shape, dtype=torch.uint8)
        for _ in range(2):
            batches = [
                example_batch(sizes, cameras, samples, config.optim.flow_samples_per_obs, device)
                for _ in range(config.grad_accum_steps)
            ]
            update(state, config, batches, single_process(model))
        with state.ema_weights() as ema_model, torch.no_grad():
            loss_sum(ema_model.forward, example_batch(sizes, cameras, samples, 4, device), config.optim.loss)
        del held_out
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: torchpi[adamw8bit]"
)
VARIANTS = [
    pytest.param({"activation_checkpointing": "full"}, id="full"),
    pytest.param({}, id="none", marks=pytest.mark.slow),
    pytest.param({"dtype": "float32"}, id="float32", marks=pytest.mark.slow),
    pytest.param({"activation_checkpointing": "selective"}, id="selective", marks=pytest.mark.slow),
    pytest.param({"grad_accum_steps": 2}, id="accumulate 2", marks=pytest.mark.slow),
    pytest.param({"grad_accum_steps": 4}, id="accumulate 4", marks=pytest.mark.slow),
    pytest.param({"flow_samples_per_obs": 2}, id="noise_samples", marks=pytest.mark.slow),
    pytest.param({"finetune": "expert", "ema_decay": 0.0}, id="expert", marks=pytest.mark.slow),
    pytest.param({"init": BASE, "finetune": "lora", "ema_decay": 0.0}, id="lora", marks=pytest.mark.slow),
    pytest.param(
        {"init": BASE, "finetune": "lora_strict", "activation_checkpointing": "full"},
        id="lora_strict",
        marks=pytest.mark.slow,
    ),
    pytest.param({"optimizer": "adamw8bit"}, id="8 bits", marks=[pytest.mark.slow, needs_bitsandbytes]),
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_planned_memory_equals_measured_memory(fields, base):
    config = base.replace(**fields)
    planned = plan(config, world_size=1, local_world_size=1)
    assert planned.peak.total == pytest.approx(measured(config, SIZES), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_planned_memory_of_pi0_equals_measured_memory(checkpointing, tmp_path):
    sizes = dataclasses.replace(SIZES, pi05=False)
    config = recipe(tmp_path, sizes).replace(activation_checkpointing=checkpointing)
    planned = plan(config, world_size=1, local_world_size=1)
    assert planned.peak.total == pytest.approx(measured(config, sizes), rel=0.03)


def test_ddp_shares_samples_and_fsdp_also_shares_the_model(tiny):
    on_cuda = tiny.replace(device="cuda", holdout=0.0)
    one = plan(on_cuda, world_size=1, local_world_size=1)
    ddp = plan(on_cuda, world_size=4, local_world_size=4)
    fsdp = plan(on_cuda.replace(parallel="fsdp"), world_size=4, local_world_size=4)
    assert (one.samples, ddp.samples, fsdp.samples) == (8, 2, 2)
    assert ddp.peak.weights == one.peak.weights
    assert ddp.peak.activations < one.peak.activations
    assert fsdp.peak.optimizer == pytest.approx(one.peak.optimizer / 4, rel=0.2)
    assert fsdp.peak.gathered > 0
    # Weights gathered in bfloat16 need no copies in bfloat16.
    assert fsdp.peak.activations < ddp.peak.activations


def test_plan_counts_the_unsharded_model_built_by_the_main_process(tiny):
    one, eight = (
        plan(tiny.replace(parallel="fsdp", ema_decay=0.0, device="cpu", holdout=0.0), world_size=n, local_world_size=n)
        for n in (1, 8)
    )
    assert one.building == eight.building > one.peak.weights
    assert eight.needed >= eight.building > eight.peak.weights

    def lora(frozen_dtype):
        config = tiny.replace(init=BASE, finetune="lora", frozen_dtype=frozen_dtype)
        return plan(config, world_size=1, local_world_size=1).building

    assert lora("bfloat16") < lora("float32")  # frozen weights are read in frozen_dtype


def test_micro_batches_need_no_second_set_of_gradients(tiny):
    on_cuda = tiny.replace(device="cuda", holdout=0.0)
    one, two = (plan(on_cuda.replace(grad_accum_steps=n), world_size=2, local_world_size=2) for n in (1, 2))
    assert one.peak.gradients == two.peak.gradients


def test_plan_that_does_not_fit_lists_alternatives(tiny, capsys):
    arguments = ["train", "--plan", "--embodiment", "metaworld", "--model", tiny.model.config, "--batch-size", "8"]
    arguments += ["--holdout", "0", "--device", "cuda"]
    main([*arguments, "--plan-memory", "1", "--json"])  # returns: it fits
    needed = json.loads(capsys.readouterr().out)["needed"]
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--plan-memory", str(needed / 1e9), "--json"])  # no room for memory that is not counted
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False
    assert {"grad_accum_steps": 2} in [other["fields"] for other in document["alternatives"] if other["fits"]]


def test_plan_prints_its_assumptions(tiny, capsys):
    main(["train", "--plan", "--embodiment", "aloha", "--model", tiny.model.config, "--device", "cuda"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "32 samples × 1 flow sample, 3 cameras and 40 prompt tokens" in printed
    assert "--plan-memory" in printed


def test_indivisible_batch_and_missing_robot_raise_error(tiny):
    with pytest.raises(ValueError, match="can't be divided"):
        plan(tiny, world_size=3, local_world_size=3)
    with pytest.raises(ValueError, match="--embodiment"):
        plan(TrainConfig(model="tiny"), world_size=1, local_world_size=1)


CHOICES = {
    "finetune": ("full", "frozen_vision", "expert", "lora", "lora_strict"),
    "activation_checkpointing": ("none", "full", "selective"),
    "grad_accum_steps": (1, 2, 4),
    "flow_samples_per_obs": (1, 3),
    "loss": ("all", "real"),
    "max_action_prefix": (0, 3),
    "ema_decay": (0.0, 0.99),
    "dtype": ("float32", "bfloat16", None),
    "frozen_dtype": ("float32", "bfloat16"),
    "parallel": ("ddp", "fsdp", "hybrid"),
    "shard_size": (0, 2),
    "state_noise": (0.0, 0.1),
    "skip_idle": (False, True),
}


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_trainable_recipe_can_be_planned(trains, tmp_path):
    """Random recipes are planned for one and two processes, and trained (in the slow test)."""
    train_helpers.write_dataset(tmp_path / "set")
    base = recipe(tmp_path, train_helpers.SIZES)
    data = {
        "dataset": str(tmp_path / "set"),
        "workers": 0,
        "trackers": (),
        "num_steps": 1,
        "holdout_samples": 2,
        "chunk_samples": 0,
    }
    for number in range(12 if trains else 1):
        rng = random.Random(number)
        options = {name: rng.choice(values) for name, values in CHOICES.items()}
        is_lora = options["finetune"].startswith("lora")
        config = base.replace(**options, init=BASE if is_lora else None)
        trained = config.replace(**data, **({"init": None, "finetune": "full"} if is_lora else {}))
        if options["parallel"] == "hybrid" and options["shard_size"] == 2:
            for refused in (
                lambda config=config: plan(config, world_size=1, local_world_size=1),
                lambda config=trained, run=tmp_path / f"run_{number}": loop.train(config, run),
            ):
                with pytest.raises(ValueError, match="can't divide the 1 processes into groups of shard_size 2"):
                    refused()
            continue
        for world_size in (1, 2):
            assert plan(config, world_size=world_size, local_world_size=world_size, device_memory=10**12).fits
        if trains:
            assert loop.train(trained, tmp_path / f"run_{number}").step == 1, options
