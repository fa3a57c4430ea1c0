"""Compiled layers, padded prompt lengths, and model FLOPs utilization."""

import functools
import json

import jaxtyping
import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter
from train_helpers import SIZES, small_recipe, write_dataset

from torchpi.collate import stack_inputs
from torchpi.config import LoraConfig
from torchpi.model import operations
from torchpi.model.lora import add_lora, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.training import loop, utilization
from torchpi.training.activation_checkpointing import checkpoint_activations
from torchpi.training.samples import example_batch

# Dynamo reads this attribute. It hides its own warning, but not if warnings are errors.
pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor")


@pytest.fixture
def graphs(monkeypatch):
    """Counter of traced graphs, which run in eager mode instead of being compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks can't be traced
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def gradients(model: Pi0, count: int) -> tuple[torch.Tensor, ...]:
    batch = example_batch(SIZES, ("base", "wrist"), count, 2, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.noise.shape, generator=generator)
    loss = model(batch.observation, batch.actions, noise=noise, time=batch.time + 0.5).mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("lora", "checkpointing"),
    [
        (True, "selective"),
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
        pytest.param(False, "selective", marks=pytest.mark.slow),
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
    ],
)
def test_layers_of_a_stack_share_one_compiled_graph(graphs, lora, checkpointing):
    model = Pi0(SIZES)
    with torch.no_grad():
        for parameter in model.expert.parameters():  # adaRMS gates are initialized to 0
            parameter.add_(0.1)
    if lora:
        add_lora(model, LoraConfig(backbone_rank=2, expert_rank=3), torch.Generator().manual_seed(0))
    expected = gradients(model, 2)
    checkpoint_activations(model, checkpointing)
    loop.compile_layers(model)
    for _ in range(2):
        torch.testing.assert_close(gradients(model, 2), expected, atol=1e-5, rtol=1e-4)
    assert graphs.frame_count == 3  # vision, backbone, expert
    gradients(model, 3)  # another shape needs another graph
    assert graphs.frame_count == 6


def test_prompts_are_padded_to_the_next_length():
    def padded(*lengths: int) -> tuple[int, ...]:
        made = [
            {
                "image": {},
                "image_mask": {},
                "state": np.zeros(2),
                "tokenized_prompt": np.ones(length, np.int64),
                "tokenized_prompt_mask": np.ones(length, np.bool_),
            }
            for length in lengths
        ]
        inputs = stack_inputs(made, [32, 48])
        assert inputs["tokenized_prompt_mask"].sum(1).tolist() == list(lengths)
        return tuple(inputs["tokenized_prompt"].shape)

    assert [padded(3, 32), padded(33, 5), padded(60, 1)] == [(2, 32), (2, 48), (2, 60)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    dataset = tmp_path_factory.mktemp("data") / "set"
    write_dataset(dataset)
    return small_recipe(
        dataset, num_steps=2, flow_samples_per_obs=2, warmup_steps=2, holdout=0.25, holdout_samples=6, chunk_samples=2,
        eval_every=2, save_every=2, log_every=1,
    )  # fmt: skip


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {f"{key} {line['step']}": line[key] for line in lines for key in ("loss", "holdout_loss") if key in line}


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_compiled_run_compiles_once_and_has_the_same_losses(recipe, graphs, tmp_path, parallel):
    loop.train(recipe.replace(compile=True, parallel=parallel), tmp_path / "compiled")
    if parallel == "ddp":  # FSDP's hooks break the graphs
        assert graphs.frame_count == 3  # the evaluation is not compiled
    loop.train(recipe, tmp_path / "eager")
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(tmp_path / "eager"), rel=1e-4)


@pytest.mark.parametrize(
    ("finetune", "factors"), [("full", (3, 3, 3)), ("frozen_vision", (1, 3, 3)), ("expert", (1, 1, 3))]
)
def test_flops_count_only_trained_parts(finetune, factors):
    model = Pi0(SIZES, device="meta")
    for name, trained in trainable_parameters(model, finetune).items():
        model.get_parameter(name).requires_grad = trained
    work = operations.Workload(SIZES, 4, 2, 20, 1, torch.bfloat16, flow_samples_per_obs=2)
    vision, prefix = (sum(op.flops for op in ops(work)) for ops in (operations.vision_ops, operations.prefix_ops))
    whole = sum(op.flops for op in operations.training_ops(work))
    expert = whole // 3 - vision - prefix
    expected = sum(factor * flops for factor, flops in zip(factors, (vision, prefix, expert), strict=True))
    assert operations.trained_flops(model, work) == expected


@pytest.mark.slow
def test_mfu_is_logged_if_the_device_peak_is_known(recipe, tmp_path, monkeypatch):
    loop.train(recipe, tmp_path / "unknown")
    assert "mfu" not in (tmp_path / "unknown" / "metrics.jsonl").read_text()
    monkeypatch.setattr(utilization, "peak_flops", lambda device, dtype: 1e9)
    loop.train(recipe, tmp_path / "known")
    lines = [json.loads(line) for line in (tmp_path / "known" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["mfu"] > 0 for line in lines if "loss" in line)
    assert "(MFU)" in (tmp_path / "known" / "report.html").read_text()


def test_peak_flops_are_known_for_listed_gpus_in_bfloat16(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert utilization.peak_flops(gpu, "bfloat16") == 312e12
    assert utilization.peak_flops(gpu, "float32") is None
    assert utilization.peak_flops(torch.device("cpu"), "bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert utilization.peak_flops(gpu, "bfloat16") is None
