"""Cases of test_cuda_correctness.py, which runs this file in a separate process: a JSON object, by case."""

import contextlib
import dataclasses
import json
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from fake_gpu import (
    COPY,
    DTYPE,
    FLOAT64,
    GENERATOR,
    MIXED,
    READ,
    GpuGenerator,
    MixedDevicesError,
    Record,
    fake_gpu,
    install_backend,
    on_device,
)
from torch import Tensor

import torchpi
from torchpi.config import PRESETS, GemmaConfig, LoraConfig, Pi0Config, VisionConfig
from torchpi.engine.bucket import Bucket
from torchpi.engine.packed import PackedModel
from torchpi.engine.runner import Runner
from torchpi.model.lora import add_lora, merge_lora
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance
from torchpi.training.augment import draw
from torchpi.training.config import Augmentation, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.loop import update
from torchpi.training.samples import SampleRng, Samples, example_batch
from torchpi.training.state import TrainState
from torchpi.training.weights import freeze

GPU = "fakegpu"
STACK = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8)
PI05 = Pi0Config(
    pi05=True,
    paligemma_variant=STACK,
    action_expert_variant=dataclasses.replace(STACK, width=8),
    siglip_variant=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
    action_dim=5,
    action_horizon=6,
    max_token_len=7,
    vocab_size=64,
    image_size=28,
)
PI0 = dataclasses.replace(PI05, pi05=False, discrete_state_input=False)
SINUSOID = dataclasses.replace(PI05, siglip_variant=dataclasses.replace(PI05.siglip, position="sincos2d"))
SIZES = {"pi05": PI05, "pi0": PI0}
CAMERAS = ("base", "wrist")
BATCH, VALID = 2, 9  # of 2·4 patches and 7 tokens, so that there is padding to drop
DROPPED = {"Pi0._embed_valid_prefix": VALID, "Pi0.sample_many": False}
"""Reads while sampling, with their number: the number of valid tokens, as some are padding."""
ONCE = {"TimeEmbedding.__call__": None}
"""Copies that a model makes once: the frequencies of the time embedding."""
IN_UPDATE = {"clip_gradients": 5.0, "update": 0.5}
"""Reads in an update: the gradient's norm and the loss, which is available by then."""

LORA = {"finetune": "lora", "init": "any"}
CASES: dict[str, Callable[[], dict[str, Any]]] = {}


def case(function: Callable[..., dict[str, Any]], name: str, **arguments: Any) -> None:
    CASES[name] = lambda: function(**arguments)


@contextlib.contextmanager
def device_of(model: Pi0, device: str = GPU, **borders: Any) -> Iterator[Record]:
    with fake_gpu(device, model, borders={**ONCE, **borders}, other_files=(__file__,)) as record:
        yield record


def result(record: Record, **more: Any) -> dict[str, Any]:
    findings = [dataclasses.asdict(finding) | {"message": str(finding)} for finding in record.findings]
    return {"findings": findings, "borders": dict(record.border_crossings), **more}


def wrong_dtypes(record: Record, model: Pi0) -> list[str]:
    """Modules whose matmuls have another dtype than the model's."""
    in_float32 = ("suffix.", "action_out_proj", "vision.patch_embed")
    assert len(record.matmuls) > 20
    return [
        f"{name}: {dtypes}"
        for name, dtypes in record.matmuls.items()
        if name and dtypes != {torch.float32 if name.startswith(in_float32) else model.compute_dtype}
    ]


def model_of(sizes: Pi0Config, dtype: str, compute_dtype: str | None = None) -> Pi0:
    compute = None if compute_dtype is None else getattr(torch, compute_dtype)
    return Pi0(sizes, device="meta", dtype=getattr(torch, dtype), compute_dtype=compute)


def observation_on(device: str, sizes: Pi0Config, batch: int = BATCH) -> torchpi.Observation:
    return example_batch(sizes, CAMERAS, batch, 1, torch.device(device)).observation


def previous_chunk(kind: str, device: str, sizes: Pi0Config) -> dict[str, Any]:
    shape = (BATCH, sizes.action_horizon, sizes.action_dim)
    inputs: dict[str, Any] = {}
    if "guided" in kind:
        inputs["guidance"] = Guidance(torch.zeros(shape, device=device), torch.zeros(shape, device=device))
    if "prefix" in kind:
        in_prefix = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        inputs["action_prefix"] = ActionPrefix(torch.zeros(shape, device=device), in_prefix)
    return inputs


def sampling(sizes: Pi0Config, kind: str, dtype: str, device: str = GPU, steps: int = 2) -> dict[str, Any]:
    """Sampling, which reads masks; then prefill and denoising as captured in a graph, without reads."""
    model = model_of(sizes, dtype)
    with device_of(model, device, **DROPPED) as record, torch.no_grad():
        observation, rtc = observation_on(device, sizes), previous_chunk(kind, device, sizes)
        actions = model.sample_actions(observation, num_steps=steps, generator=GpuGenerator(device), **rtc)
        assert on_device(record, actions)
        assert actions.dtype is torch.float32
        before = record.border_crossings.copy()
        prefix = model.embed_prefix(observation)
        for no_padding in (False, True):
            cache = model.prefill(observation, prefix, no_padding=no_padding)
            for samples in (1, 2):
                noises = actions[:, None].expand(-1, samples, -1, -1)
                assert model.denoise(cache, noises, num_steps=steps, **rtc).actions.dtype is torch.float32
        assert record.border_crossings == before
    return result(record, dtypes=wrong_dtypes(record, model))


def engine(sizes: Pi0Config, kind: str, dtype: str) -> dict[str, Any]:
    """A bucket of the engine: everything that a CUDA graph captures, with plain operations in place of the kernels."""
    model = model_of(sizes, dtype)
    with device_of(model) as record, torch.no_grad():
        rtc = previous_chunk(kind, GPU, sizes)
        bucket = Bucket(
            BATCH,
            len(CAMERAS),
            prompt_tokens=5,
            horizon=sizes.require("action_horizon"),
            num_samples=2,
            num_steps=2,
            guidance=5.0 if "guidance" in rtc else None,
            action_prefix="action_prefix" in rtc,
        )
        packed, times = PackedModel(model), model.step_conditionings(2, action_prefix=bucket.action_prefix)
        before = record.border_crossings.copy()
        runner = Runner(packed, bucket, "eager", times)
        actions, residual = runner(runner.inputs)
        assert record.border_crossings == before
        assert on_device(record, actions)
        assert actions.dtype is residual.dtype is torch.float32
    return result(record, dtypes=[])


def full_size() -> dict[str, Any]:
    """The published π₀.₅ in bfloat16."""
    model = model_of(PRESETS["pi05"], "bfloat16")
    with device_of(model, "cuda", **DROPPED) as record, torch.no_grad():
        observation = example_batch(model.config, ("a", "b", "c"), 1, 1, torch.device("cuda")).observation
        model.sample_actions(observation, num_steps=1, generator=GpuGenerator("cuda"))
    return result(record, dtypes=wrong_dtypes(record, model))


def loss(sizes: Pi0Config, dtype: str, compute_dtype: str, lora: bool = False) -> dict[str, Any]:
    """Forward and backward pass, with flow samples, action prefixes and a mask; and loss with drawn noise and time."""
    model = model_of(sizes, dtype, compute_dtype)
    with device_of(model) as record:
        if lora:
            attach_lora(record, model)
        batch = example_batch(sizes, CAMERAS, BATCH, 3, torch.device(GPU))
        prefix_len = torch.zeros(batch.time.shape, dtype=torch.int64, device=GPU)
        batch = dataclasses.replace(batch, prefix_len=prefix_len)
        elements = model(
            batch.observation,
            batch.actions,
            noise=batch.noise,
            time=batch.time,
            prefix_len=prefix_len,
            loss_mask=batch.loss_mask("real"),
        )
        elements.mean().backward()
        drawn = model.compute_loss(batch.observation, batch.actions, generator=GpuGenerator(GPU))
        drawn.mean().backward()
        assert elements.dtype is drawn.dtype is torch.float32
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert on_device(record, parameter.grad)
                assert parameter.grad.dtype is parameter.dtype
    return result(record, dtypes=wrong_dtypes(record, model))


def attach_lora(record: Record, model: Pi0) -> None:
    add_lora(model, LoraConfig(backbone_rank=2, expert_rank=3), GpuGenerator(GPU))
    record.name_modules(model)


def lora(sizes: Pi0Config) -> dict[str, Any]:
    """Sampling with LoRA, and after merging it."""
    model = model_of(sizes, "bfloat16")
    with device_of(model, **DROPPED) as record, torch.no_grad():
        attach_lora(record, model)
        model.sample_actions(observation_on(GPU, sizes), num_steps=2, generator=GpuGenerator(GPU))
        dtypes = wrong_dtypes(record, model)
        merge_lora(model)  # merges in float32
        record.name_modules(model)
        model.sample_actions(observation_on(GPU, sizes), num_steps=2, generator=GpuGenerator(GPU))
    return result(record, dtypes=dtypes)


def updates(
    sizes: Pi0Config, micro_batches: int, norm: float = 5.0, loss: str = "all", recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Two updates; the second has AdamW's moments."""
    config = TrainConfig(embodiment="metaworld", loss=loss, ema_decay=0.9, **(recipe or {}))
    optim = config.optim
    model = model_of(sizes, "float32", "bfloat16")
    with device_of(model, **{**IN_UPDATE, "clip_gradients": norm}) as record:
        if config.model.finetune.startswith("lora"):
            attach_lora(record, model)
        freeze(model, config)
        state = TrainState.create(model, weight_decay=0.1, ema=True)
        batches = [example_batch(sizes, CAMERAS, BATCH, 2, torch.device(GPU)) for _ in range(micro_batches)]
        if optim.max_action_prefix:
            prefix_len = torch.zeros(batches[0].time.shape, dtype=torch.int64, device=GPU)
            batches = [dataclasses.replace(batch, prefix_len=prefix_len) for batch in batches]
        for _ in range(2):
            value, numbers = update(state, config, batches, single_process(model))
            assert (value, numbers["grad_norm"]) == (0.5, norm)
        tensors = state.tensors()
        assert len(tensors) == 4 * len(state.trainable)  # weights, EMA and two moments
        assert all(on_device(record, tensor) for tensor in tensors.values())
    return result(record, dtypes=wrong_dtypes(record, model))


def batches(augmentation: Augmentation) -> dict[str, Any]:
    """Transfer of a loader's batch to the device, conversion of images to floats, and augmentation."""
    rng = np.random.default_rng(0)
    chunk = (PI05.action_horizon, PI05.action_dim)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (PI05.image_size, PI05.image_size, 3), np.uint8)

    def sample(index: int) -> dict[str, Any]:
        return {
            "image": {name: image() for name in CAMERAS},
            "image_mask": dict.fromkeys(CAMERAS, np.True_),
            "state": np.zeros(PI05.action_dim, np.float32),
            "tokenized_prompt": np.zeros(index + 2, np.int64),
            "tokenized_prompt_mask": np.ones(index + 2, np.bool_),
            "actions": np.zeros(chunk),
            "is_real": np.ones(chunk, np.bool_),
            "noise": np.zeros((2, *chunk)),
            "time": np.ones(2),
            "prefix_len": np.zeros(2),
            "augmentation": {name: draw(augmentation, rng, PI05.image_size) for name in CAMERAS},
            "index": (0, index, 0, index),
        }

    samples = Samples((), SampleRng(0, 2, augmentation=augmentation, max_action_prefix=2))
    stacked = samples.collate([sample(index) for index in range(4)])
    assert any(values[:, 3:].any() for values in stacked["augmentation"].values())
    with device_of(model_of(PI05, "float32"), to_device=None) as record:
        tensors = samples.finish(stacked, GPU).to_tensors()
        assert all(on_device(record, tensor) for name, tensor in tensors.items() if name != "indices")
        assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("image.")} == {torch.float32}
    return result(record, dtypes=[])


def policy(kind: str) -> dict[str, Any]:
    """`Policy.infer` from observation to actions, with and without a previous chunk."""
    policy = torchpi.load_policy("demo", device="cpu")
    sizes, observation = policy.model.config, policy.example_observation()
    chunk = policy.infer(observation, num_steps=1)["actions"]
    rtc: dict[str, Any] = {"action_prefix": chunk[2:], "delay": 1}
    if kind == "prefix":
        policy._metadata["max_action_prefix"] = 4
    borders = {
        "Pi0._embed_valid_prefix": 9,
        "Pi0.sample_many": False,
        "Observation.to": None,
        "rtc_inputs": None,
        "Policy.infer_batch": None,
    }
    with device_of(policy.model, **borders) as record:
        noise = np.zeros((sizes.action_horizon, sizes.action_dim), np.float32)
        assert policy.infer(observation, num_steps=2, noise=noise, **rtc)["actions"].shape == chunk.shape
        policy.infer(observation, num_steps=2, generator=GpuGenerator(GPU))
    return result(record, dtypes=wrong_dtypes(record, policy.model))


for variant, sizes in SIZES.items():
    case(sampling, f"sampling {variant}", sizes=sizes, kind="plain", dtype="bfloat16")
    case(sampling, f"sampling {variant} float32 cuda", sizes=sizes, kind="prefix", dtype="float32", device="cuda")
    case(sampling, f"sampling {variant} guided, prefix", sizes=sizes, kind="guided, prefix", dtype="bfloat16")
    case(engine, f"engine {variant}", sizes=sizes, kind="plain", dtype="bfloat16")
    case(engine, f"engine {variant} guided, prefix", sizes=sizes, kind="guided, prefix", dtype="bfloat16")
    case(loss, f"loss {variant}", sizes=sizes, dtype="float32", compute_dtype="bfloat16")
case(sampling, "sampling sincos2d guided", sizes=SINUSOID, kind="guided", dtype="float32")
case(full_size, "sampling full size cuda")
case(loss, "loss LoRA", sizes=PI05, dtype="bfloat16", compute_dtype="bfloat16", lora=True)
case(lora, "sampling LoRA", sizes=PI05)
case(updates, "update pi05", sizes=PI05, micro_batches=1)
case(updates, "update pi0 micro-batches", sizes=PI0, micro_batches=2, norm=0.5)
case(updates, "update real elements", sizes=PI05, micro_batches=2, loss="real", recipe={"max_action_prefix": 3})
case(updates, "update LoRA", sizes=PI05, micro_batches=1, recipe=LORA)
case(batches, "batch", augmentation=Augmentation(color_probability=1.0))
case(batches, "batch without hue", augmentation=Augmentation(saturation=0.0, hue=0.0))
for kind in ("guided", "prefix"):
    case(policy, f"policy {kind}", kind=kind)


# ---- mistakes, put into each Euler step ----


def adds_a_constant_of_the_host(x: Tensor) -> None:
    x + torch.ones(5)


def reads_a_number(x: Tensor) -> None:
    x.mean().item()


def asks_a_mask(x: Tensor) -> None:
    bool((x == 0).all())


def converts_to_int(x: Tensor) -> None:
    int(x.argmax())


def lists_the_numbers(x: Tensor) -> None:
    x[0, 0].tolist()


def moves_to_the_host(x: Tensor) -> None:
    x.cpu()


def selects_with_a_mask(x: Tensor) -> None:
    x[x > 0]


def writes_with_a_mask(x: Tensor) -> None:
    x.clone()[x > 0] = 1.0


def looks_for_nonzeros(x: Tensor) -> None:
    x.nonzero()


def makes_a_tensor_of_numbers_of_the_device(x: Tensor) -> None:
    torch.tensor([float(x[0, 0, 0])])


def makes_a_tensor_of_a_list(x: Tensor) -> None:
    x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=x.device)


def moves_a_constant_to_the_device(x: Tensor) -> None:
    x + torch.ones(5).to(x.device)


def indexes_with_a_list(x: Tensor) -> None:
    x[[0, 1]]


def indexes_with_an_index_of_the_host(x: Tensor) -> None:
    x[torch.tensor([0, 1])]


def chooses_a_scalar_of_the_host(x: Tensor) -> None:
    torch.where(x > 0, x, torch.tensor(0.0))


def computes_in_float64(x: Tensor) -> None:
    x * torch.ones(5, dtype=torch.float64, device=x.device)


def draws_with_a_generator_of_the_host(x: Tensor) -> None:
    torch.randn(x.shape, generator=torch.Generator(), device=x.device)


def fills_with_a_generator_of_the_host(x: Tensor) -> None:
    torch.empty_like(x).normal_(generator=torch.Generator())


def normalizes_in_bfloat16(x: Tensor) -> None:
    x.bfloat16().square().mean().rsqrt()


MISTAKES: dict[str, list[types.FunctionType]] = {
    MIXED: [adds_a_constant_of_the_host],
    READ: [
        reads_a_number,
        asks_a_mask,
        converts_to_int,
        lists_the_numbers,
        moves_to_the_host,
        selects_with_a_mask,
        writes_with_a_mask,
        looks_for_nonzeros,
        makes_a_tensor_of_numbers_of_the_device,
    ],
    COPY: [
        makes_a_tensor_of_a_list,
        moves_a_constant_to_the_device,
        indexes_with_a_list,
        indexes_with_an_index_of_the_host,
        chooses_a_scalar_of_the_host,
    ],
    FLOAT64: [computes_in_float64],
    GENERATOR: [draws_with_a_generator_of_the_host, fills_with_a_generator_of_the_host],
    DTYPE: [normalizes_in_bfloat16],
}


def mistaken() -> dict[str, dict[str, Any]]:
    """Findings for denoising steps with one mistake each."""
    model, step = model_of(PI05, "bfloat16"), Pi0.denoise_step
    mistakes = [function for functions in MISTAKES.values() for function in functions]
    remaining = iter(mistakes)

    def denoise_step(self: Pi0, cache: Any, x_t: Tensor, time: Any) -> Tensor:
        with contextlib.suppress(MixedDevicesError):
            next(remaining)(x_t)
        return step(self, cache, x_t, time)

    with device_of(model) as record, torch.no_grad(), mock.patch.object(Pi0, "denoise_step", denoise_step):
        noise = torch.zeros(BATCH, 1, PI05.action_horizon, PI05.action_dim, device=GPU)
        model.denoise(model.prefill(observation_on(GPU, PI05)), noise, num_steps=len(mistakes))
    findings = result(record)["findings"]
    assert {finding["function"] for finding in findings} == {function.__name__ for function in mistakes}
    return {
        function.__name__: {"findings": [found for found in findings if found["function"] == function.__name__]}
        for function in mistakes
    }


def mistaken_in_backward() -> dict[str, Any]:
    """Hook that reads a value of the gradient."""
    model = model_of(PI05, "float32")
    with device_of(model) as record:
        batch = example_batch(PI05, CAMERAS, BATCH, 1, torch.device(GPU))
        model.action_out_proj.weight.register_hook(reads_a_number)
        model.compute_loss(batch.observation, batch.actions, generator=GpuGenerator(GPU)).mean().backward()
    return result(record)


def mistaken_dtype() -> dict[str, Any]:
    """Vision tower computed in float32."""
    model = model_of(PI05, "bfloat16")
    forward = model.vision.forward
    with device_of(model) as record, torch.no_grad():
        model.vision.forward = lambda images, dtype: forward(images, torch.float32).to(dtype)
        model.prefill(observation_on(GPU, PI05))
        model.vision.forward = forward
    dtypes = {name: found for name, found in record.matmuls.items() if found == {torch.float32}}
    return result(record, dtypes=[name for name in dtypes if name.startswith("vision.blocks")])


case(mistaken_in_backward, "mistake in the backward pass")
case(mistaken_dtype, "mistake in the dtype")


def main() -> None:
    """Run the cases named on the command line, and those with mistakes in an Euler step."""
    install_backend()
    results = {}
    for name in sys.argv[1:]:
        try:
            results[name] = CASES[name]()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    results |= mistaken()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
