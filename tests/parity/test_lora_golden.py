"""The model with LoRA compared with openpi: loss, gradients, actions and freeze rule, in float32."""

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
from torchpi.model.lora import LoraConfig, add_lora, lora_config, trainable_parameters
from torchpi.robots.keys import nest

ALPHA = (8.0, 3.0)
# A key bias shifts all logits of a query equally: its gradient is rounding noise, which Adam scales up.
NO_GRADIENT = "MultiHeadDotProductAttention_0.key.bias"


class LoraGolden:
    """A golden model with LoRA, with the batches and random numbers of its training."""

    def __init__(self, root: pathlib.Path, kind: str) -> None:
        self.root = root / "lora" / kind
        self.inputs = self._arrays(root / kind / "inputs.npz")
        self.batches = self._arrays(root / "training" / kind / "batches.npz")

    @staticmethod
    def _arrays(path: pathlib.Path) -> dict[str, Tensor]:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def arrays(self, name: str) -> dict[str, Tensor]:
        return self._arrays(self.root / f"{name}.npz")

    def document(self, name: str):
        return json.loads((self.root / f"{name}.json").read_text())

    def model(self) -> torchpi.Pi0:
        """Load a fresh copy with LoRA attached."""
        config = self.root / "model_config.json"
        return torchpi.load_model(self.root / "jax_ckpt", config=config, lora_alpha=ALPHA, lora="keep")

    def leaves(self, model: torchpi.Pi0) -> dict[str, CheckpointArray]:
        config = lora_config(model)
        assert config is not None
        return jax_table(model.config) | lora_table(model.config, config)

    def batch(self, index: int) -> tuple[torchpi.Observation, Tensor]:
        prefix = f"batch{index}."
        return self._observation({n.removeprefix(prefix): v for n, v in self.batches.items() if n.startswith(prefix)})

    def first(self) -> tuple[torchpi.Observation, Tensor]:
        return self._observation(self.inputs)

    @staticmethod
    def _observation(arrays: Mapping[str, Tensor]) -> tuple[torchpi.Observation, Tensor]:
        return torchpi.Observation.from_dict(nest(arrays)), arrays["actions"]


@pytest.fixture(params=["pi05", "pi0"], scope="module")
def lora(request, golden_root) -> LoraGolden:
    return LoraGolden(golden_root, request.param)


@pytest.fixture(scope="module")
def model(lora):
    return lora.model()


def test_loss_and_gradients(lora, model):
    observation, actions = lora.first()
    loss = model.compute_loss(observation, actions, noise=lora.inputs["noise"], time=lora.inputs["time"])
    torch.testing.assert_close(loss.detach(), lora.arrays("outputs")["compute_loss"], atol=2e-5, rtol=0)
    loss.mean().backward()
    leaves = lora.leaves(model)
    for parameter in model.parameters():  # JAX has zeros for parameters that do not affect the loss
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {name: stored_array(model, leaf) for name, leaf in leaves.items()}
    for name, theirs in lora.arrays("grads").items():
        error = (gradients[name] - theirs).abs().max() / theirs.abs().max()
        assert error <= 2e-4, (name, float(error))
    norms = {name.replace("/", "."): norm for name, norm in lora.document("grad_norms").items()}
    assert set(norms) == set(gradients)
    for name, theirs in norms.items():
        if NO_GRADIENT not in name:
            assert float(gradients[name].norm()) == pytest.approx(theirs, rel=2e-4, abs=1e-9), name


def test_sampled_actions(lora):
    observation, _ = lora.first()
    actions = lora.model().sample_actions(observation, noise=lora.inputs["noise"])
    torch.testing.assert_close(actions, lora.arrays("outputs")["sample_actions_10"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        ((4, 6), "paligemma_variant=gemma_2b_lora, action_expert_variant=gemma_300m_lora"),
        ((4, 0), "paligemma_variant=gemma_2b_lora, action_expert_variant=gemma_300m"),
        ((0, 6), "paligemma_variant=gemma_2b, action_expert_variant=gemma_300m_lora"),
    ],
)
def test_frozen_parameters_equal_openpis_filter(lora, ranks, case):
    config = torchpi.Pi0Config.from_json(lora.root / "model_config.json")
    model = torchpi.Pi0(config, device="meta")
    add_lora(model, LoraConfig(backbone_rank=ranks[0], expert_rank=ranks[1]), None)
    trained = trainable_parameters(model, "lora")
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, leaf in lora.leaves(model).items():
        found[trained[leaf.slices[0].param]].add(name.replace(".", "/"))
    expected = lora.document("freeze_filter")[case]
    assert found[True] == set(expected["trainable"])
    assert found[False] == set(expected["frozen"])
