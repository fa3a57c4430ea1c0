"""Training updates compared with openpi: 20 of the whole model, 10 with LoRA, with the same noise and time."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import torchpi
from torchpi.checkpoints.layout import CheckpointArray, stored_array
from torchpi.checkpoints.openpi_layout import jax_table, lora_table
from torchpi.model.lora import lora_config, trainable_parameters
from torchpi.robots.keys import nest
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import update
from torchpi.training.samples import Batch
from torchpi.training.state import TrainState
from torchpi.training.weights import freeze

RECIPE = TrainConfig(batch_size=2, lr=1e-3, min_lr=1e-4, ema_decay=0.9, dtype="float32", frozen_dtype="float32")
# A key bias shifts all logits of a query equally: its gradient is rounding noise, which Adam scales up.
NO_GRADIENT = "MultiHeadDotProductAttention_0.key.bias"


class Trajectory:
    """Golden training run of a model."""

    def __init__(self, root: pathlib.Path, kind: str, *, lora: bool) -> None:
        self.root = root / ("lora" if lora else "training") / kind
        self.start = root / "lora" / kind if lora else root / kind
        self.lora = lora
        self.batches = self.arrays(root / "training" / kind / "batches.npz")
        self.draws = self.arrays(self.root / "draws.npz")
        self.expected = json.loads((self.root / "training.json").read_text())
        schedule = {"warmup_steps": 3, "num_steps": 10} if lora else {"warmup_steps": 5, "num_steps": 20}
        what = {"finetune": "lora", "init": str(self.start)} if lora else {}
        self.recipe = RECIPE.replace(**schedule, **what)

    @staticmethod
    def arrays(path: pathlib.Path) -> dict[str, Tensor]:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def begin(self, recipe: TrainConfig) -> TrainState:
        options = {"lora_alpha": (8.0, 3.0), "lora": "keep"} if self.lora else {}
        checkpoint = self.start / ("jax_ckpt" if self.lora else "jax_ckpt_pure")
        model = torchpi.load_model(checkpoint, config=self.start / "model_config.json", **options)
        model.compute_dtype_override = torch.float32
        freeze(model, recipe)
        checkpoint_activations(model, recipe.model.activation_checkpointing)
        return TrainState.create(model, weight_decay=recipe.optim.weight_decay, ema=True)

    def batch(self, step: int) -> Batch:
        prefix = f"batch{int(self.draws['batch_index'][step])}."
        arrays = nest({n.removeprefix(prefix): value for n, value in self.batches.items() if n.startswith(prefix)})
        actions = arrays["actions"]
        is_real = torch.ones_like(actions, dtype=torch.bool)
        noise, time = self.draws["noise"][step][:, None], self.draws["time"][step][:, None]
        return Batch(torchpi.Observation.from_dict(arrays), actions, is_real, noise, time, indices=())

    def leaves(self, state: TrainState) -> dict[str, CheckpointArray]:
        config = lora_config(state.model)
        return jax_table(state.model.config) | (lora_table(state.model.config, config) if config else {})

    def check_weights(self, state: TrainState, file: str) -> None:
        leaves = self.leaves(state)
        for name, theirs in self.arrays(self.root / file).items():
            if NO_GRADIENT not in name:
                error = (stored_array(state.model, leaves[name]) - theirs).abs().max()
                assert error <= 1e-4, (name, float(error))


def follow(trajectory: Trajectory, recipe: TrainConfig, steps: int) -> TrainState:
    """Run updates, and compare losses, gradient norms and learning rates with openpi's."""
    state = trajectory.begin(recipe)
    parallel, expected = single_process(state.model), trajectory.expected
    for step in range(steps):
        loss, numbers = update(state, recipe, [trajectory.batch(step)], parallel)
        assert float(loss) == pytest.approx(expected["loss"][step], abs=2e-5), step
        assert numbers["grad_norm"] == pytest.approx(expected["grad_norm"][step], abs=2e-4), step
        assert numbers["lr"] == pytest.approx(expected["lr_at_step"][step], rel=1e-5), step
    return state


@pytest.fixture(params=["pi05", "pi0"], scope="module")
def whole(request, golden_root) -> Trajectory:
    return Trajectory(golden_root, request.param, lora=False)


@pytest.fixture(params=["pi05", "pi0"], scope="module")
def with_lora(request, golden_root) -> Trajectory:
    return Trajectory(golden_root, request.param, lora=True)


def test_first_updates(whole):
    follow(whole, whole.recipe, 3)


@pytest.mark.slow
def test_twenty_updates(whole):
    state = follow(whole, whole.recipe, 20)
    whole.check_weights(state, "final_params.npz")
    with state.ema_weights():
        whole.check_weights(state, "final_ema_params.npz")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(whole, checkpointing):
    recipe = whole.recipe.replace(activation_checkpointing=checkpointing)
    plain, again = follow(whole, whole.recipe, 3), follow(whole, recipe, 3)
    for name, part in plain.trainable.items():
        assert torch.equal(part, again.trainable[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpointing_with_lora_changes_nothing(with_lora, checkpointing):
    recipe = with_lora.recipe.replace(activation_checkpointing=checkpointing)
    plain, again = follow(with_lora, with_lora.recipe, 2), follow(with_lora, recipe, 2)
    for name, part in plain.trainable.items():
        assert torch.equal(part, again.trainable[name]), name


@pytest.mark.slow
def test_ten_updates_with_lora(with_lora):
    state = follow(with_lora, with_lora.recipe, 10)
    with_lora.check_weights(state, "final_trainable_params.npz")
    with state.ema_weights():
        with_lora.check_weights(state, "final_trainable_ema_params.npz")


@pytest.mark.slow
def test_ten_updates_with_lora_and_frozen_weights_in_bfloat16(with_lora):
    recipe = with_lora.recipe.replace(frozen_dtype="bfloat16")
    with_lora.expected = {**with_lora.expected, **with_lora.expected["frozen_bfloat16"]}
    state = follow(with_lora, recipe, 10)
    dtypes: Mapping[bool, set] = {True: set(), False: set()}
    changed = trainable_parameters(state.model, "lora")
    for name, parameter in state.model.named_parameters():
        dtypes[changed[name]].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
