"""benchmarks/training_recipe.py: each variant trains with the change that its name states."""

import argparse
import json

import pytest
import torch
import training_recipe
from train_helpers import SIZES, weights, write_dataset

from torchpi.training import optim
from torchpi.training.samples import Samples
from torchpi.training.state import TrainState


@pytest.mark.slow
def test_variants_train_and_leave_no_patch(tmp_path):
    write_dataset(tmp_path / "set")
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES.to_dict()))
    originals = (Samples.collate, TrainState.create, optim.update_ema)
    arguments = argparse.Namespace(dataset=str(tmp_path / "set"), select=None, init=None, lr=1e-3, steps=2)
    states = {}
    for variant in training_recipe.VARIANTS:
        config = training_recipe.recipe(variant, 0, arguments)
        config = config.replace(batch_size=4, workers=0, holdout_samples=2, model=str(tmp_path / "sizes.json"))
        policy = training_recipe.train(variant, config, tmp_path / variant)
        assert policy.is_dir()
        assert training_recipe.holdout_loss(tmp_path / variant) > 0
        states[variant] = weights(tmp_path / variant)
    for variant, state in states.items():
        low = "bfloat16" in training_recipe.VARIANTS[variant]
        dtypes = {name: value.dtype for name, value in state.items() if name.startswith("weights.")}
        assert set(dtypes.values()) == {torch.bfloat16 if low else torch.float32}
        averages = {name: value.dtype for name, value in state.items() if name.startswith("ema.")}
        assert bool(averages) == ("no EMA" not in training_recipe.VARIANTS[variant])
        assert set(averages.values()) <= {torch.float32}
    assert (Samples.collate, TrainState.create, optim.update_ema) == originals


def test_plot_shows_every_variant(tmp_path):
    results = [{"variant": name, "episodes": 20, "success_rate": 0.5} for name in training_recipe.VARIANTS]
    training_recipe.plot(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 5000
