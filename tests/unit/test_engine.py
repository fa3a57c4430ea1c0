"""The engine samples the model's actions in every bucket, and falls back or raises errors otherwise."""

import contextlib
import copy
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import warnings

import jaxtyping
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torchpi
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.engine import InferenceEngine
from torchpi.engine.bucket import Bucket
from torchpi.engine.engine import _best_kernels
from torchpi.engine.kernels import PLAIN
from torchpi.engine.runner import GraphMemory, Runner
from torchpi.model.lora import LoraConfig, add_lora
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import ActionPrefix, Guidance, prefix_weights
from torchpi.types import Observation

HORIZON, ACTION_DIM, BATCH = 7, 6, 3
DELAYS = torch.tensor([1, 2, 0])


def make_model(*, pi05: bool = True, dtype: torch.dtype = torch.float32) -> Pi0:
    config = Pi0Config(
        pi05=pi05,
        paligemma_variant=GemmaConfig(width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=16),
        action_expert_variant=GemmaConfig(width=24, depth=2, mlp_dim=40, num_heads=4, num_kv_heads=1, head_dim=16),
        siglip_variant=VisionConfig(width=24, depth=2, mlp_dim=32, num_heads=3, patch=14),
        vocab_size=300,
        image_size=28,
        action_dim=ACTION_DIM,
        action_horizon=HORIZON,
        max_token_len=50,
    )
    model = Pi0(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator)
    return model


def make_observation(lengths=(17, 9, 12), *, cameras=2, present=None) -> Observation:
    """Random samples with prompts of these lengths; `present` [N, B] marks the cameras that each sample has."""
    generator = torch.Generator().manual_seed(2)
    batch = len(lengths)
    masks = torch.ones(cameras, batch, dtype=torch.bool) if present is None else torch.tensor(present)
    return Observation.from_dict(
        {
            "image": {f"c{i}": torch.rand(batch, 28, 28, 3, generator=generator) * 2 - 1 for i in range(cameras)},
            "image_mask": {f"c{i}": masks[i] for i in range(cameras)},
            "state": torch.randn(batch, ACTION_DIM, generator=generator),
            "tokenized_prompt": torch.randint(0, 300, (batch, 50), generator=generator),
            "tokenized_prompt_mask": torch.arange(50) < torch.tensor(lengths)[:, None],
        }
    )


def noise_of(batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(3))


def conditions(names: tuple[str, ...]) -> dict:
    generator = torch.Generator().manual_seed(4)
    chunk = torch.randn(BATCH, HORIZON, ACTION_DIM, generator=generator)
    weight = prefix_weights(HORIZON, DELAYS, torch.tensor([3, 2, 3]))[:, :, None].expand_as(chunk).contiguous()
    in_prefix = torch.arange(HORIZON) < DELAYS[:, None]
    made = {"guidance": Guidance(chunk, weight), "action_prefix": ActionPrefix(chunk, in_prefix)}
    return {name: made[name] for name in names}


RTC = [(), ("guidance",), ("action_prefix",), ("guidance", "action_prefix")]


@pytest.mark.parametrize("rtc", RTC, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
def test_engine_samples_the_models_actions(pi05, rtc):
    model, observation = make_model(pi05=pi05), make_observation()
    engine = InferenceEngine(model, mode="eager")
    expected = model.sample_actions(observation, noise=noise_of(), num_steps=4, **conditions(rtc))
    for _ in range(2):  # the second call must overwrite the first one's static tensors
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=4, **conditions(rtc))
        torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    assert expected.abs().max() > 1


def test_engine_in_bfloat16_stays_within_its_rounding():
    exact, model = make_model(), make_model(dtype=torch.bfloat16)
    engine = InferenceEngine(model, mode="eager")
    exact.load_state_dict(model.state_dict())
    samples = {"observation": make_observation(), "noise": noise_of(), "num_steps": 4}
    reference = exact.sample_actions(**samples)
    error = (engine.sample_actions(**samples) - reference).abs().mean()
    assert error < 1.5 * (model.sample_actions(**samples) - reference).abs().mean()


@pytest.mark.parametrize("lengths", [(1,), (32,), (33,), (50,)])
def test_padding_to_a_bucket_changes_nothing(lengths):
    model, observation = make_model(), make_observation(lengths)
    engine = InferenceEngine(model, mode="eager", prompt_lengths=(32,))
    actions = engine.sample_actions(observation, noise=noise_of(1), num_steps=2)
    torch.testing.assert_close(
        actions, model.sample_actions(observation, noise=noise_of(1), num_steps=2), rtol=1e-5, atol=5e-6
    )


def test_bucket_is_reused_by_shorter_prompts_and_fewer_samples_and_other_delays():
    model = make_model()
    engine = InferenceEngine(model, mode="eager")
    for lengths in ((17, 9, 12), (30, 2, 1), (1, 1, 1)):
        for samples in (3, 4):
            observation = make_observation((lengths * 2)[:samples])
            actions = engine.sample_actions(observation, noise=noise_of(samples), num_steps=2)
            expected = model.sample_actions(observation, noise=noise_of(samples), num_steps=2)
            torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    assert engine.metadata["warm_buckets"] == ["batch 4, 2 cameras, 32 prompt tokens, 7 actions, 2 steps"]


def test_bucket_excludes_absent_cameras():
    model, engine_of = make_model(), lambda model: InferenceEngine(model, mode="eager")
    engine = engine_of(model)
    observation = make_observation(present=[[True] * 3, [False] * 3])
    actions = engine.sample_actions(observation, noise=noise_of(), num_steps=2)
    expected = model.sample_actions(observation, noise=noise_of(), num_steps=2)
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    assert engine.metadata["warm_buckets"] == ["batch 4, 1 camera, 32 prompt tokens, 7 actions, 2 steps"]


@pytest.mark.parametrize(
    ("observation", "settings"),
    [
        (make_observation(present=[[True] * 3, [True, False, True]]), {}),
        (make_observation(), {"batch_sizes": (1, 2)}),
    ],
    ids=["cameras differ", "batch beyond the largest"],
)
def test_plain_model_samples_inputs_that_fit_no_bucket(observation, settings):
    model = make_model()
    engine = InferenceEngine(model, mode="eager", **settings)
    actions = engine.sample_actions(observation, noise=noise_of(), num_steps=2)
    torch.testing.assert_close(
        actions, model.sample_actions(observation, noise=noise_of(), num_steps=2), rtol=0, atol=0
    )
    assert engine.metadata["warm_buckets"] == []


def test_plain_model_samples_prompt_longer_than_every_bucket():
    model = make_model()
    model.config = dataclasses.replace(model.config, max_token_len=None)
    engine = InferenceEngine(model, mode="eager", prompt_lengths=(8,))
    engine.sample_actions(make_observation((9,)), noise=noise_of(1), num_steps=1)
    assert engine.metadata["warm_buckets"] == []


def test_engine_draws_the_models_noise():
    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager")
    drawn = [
        sampler.sample_actions(observation, num_steps=1, generator=torch.Generator().manual_seed(7))
        for sampler in (engine, model)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=5e-6)


def test_least_recently_used_bucket_is_dropped():
    engine = InferenceEngine(make_model(), mode="eager", max_buckets=2)
    for num_steps in (1, 2, 1, 3):
        engine.sample_actions(make_observation(), noise=noise_of(), num_steps=num_steps)
    assert [bucket.split(", ")[4] for bucket in engine.metadata["warm_buckets"]] == ["1 step", "3 steps"]


def scale_a_matrix(model):
    with torch.no_grad():
        model.backbone.layers[0].attention.qkv.weight.mul_(2)


def swap_with_ema_weights(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def replace_a_layer(model):
    model.action_out_proj = copy.deepcopy(model.action_out_proj)


def train(model, **settings):
    observation, actions = make_observation(), noise_of()
    model.compute_loss(observation, actions, noise=noise_of(), time=torch.full((BATCH,), 0.5)).mean().backward()
    torch.optim.AdamW(model.parameters(), **settings).step()


CHANGES = {
    "in place": scale_a_matrix,
    "other data": swap_with_ema_weights,
    "load_state_dict": lambda model: model.load_state_dict(make_model().state_dict()),
    "load_state_dict, assign": lambda model: model.load_state_dict(make_model().state_dict(), assign=True),
    "a layer": replace_a_layer,
    "LoRA": lambda model: add_lora(model, LoraConfig(backbone_rank=2, expert_rank=2), torch.Generator().manual_seed(0)),
    "dtype": lambda model: model.to(torch.bfloat16),
    "device": lambda model: model.to("meta"),
    "optimizer": train,
    "fused optimizer": lambda model: train(model, fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_refused(change):
    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager")
    engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    change(model)
    with pytest.raises(ValueError, match="weights changed after the engine had packed them; build a new engine"):
        engine.sample_actions(observation, noise=noise_of(), num_steps=1)


def test_unmerged_lora_is_refused():
    model = make_model()
    add_lora(model, LoraConfig(backbone_rank=2, expert_rank=2), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="merge_lora"):
        InferenceEngine(model)


def test_graphs_without_a_cuda_device_are_refused():
    with pytest.raises(ValueError, match='captures CUDA graphs; the device is cpu: use "compiled" or "eager"'):
        InferenceEngine(make_model(), mode="graph")


@pytest.mark.parametrize("settings", [{"max_buckets": 0}, {"batch_sizes": ()}, {"prompt_lengths": (0, 32)}])
def test_sizes_that_are_not_positive_are_refused(settings):
    with pytest.raises(ValueError, match="must be positive"):
        InferenceEngine(make_model(), **settings)


def test_out_of_memory_falls_back_with_one_warning(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager")
    monkeypatch.setattr(Runner, "_sample", no_memory)
    monkeypatch.setattr(Runner, "__init__", lambda self, *args: self._sample())
    with pytest.warns(UserWarning, match=r"cannot prepare the bucket batch 4, 2 cameras.*2.00 GiB"):
        first = engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    assert torch.equal(first, second)


def test_failed_capture_releases_memory_and_generator(monkeypatch):
    """Otherwise PyTorch refuses further captures and random numbers on the device."""

    class Generator:
        state = "in a capture"

        def clone_state(self):
            return "a copy"

        def graphsafe_set_state(self, state):
            self.state = state

    def failed(*args):
        raise RuntimeError("operation failed due to a previous error during capture\n\nCompile with TORCH_USE_CUDA_DSA")

    model, observation, generator = make_model(), make_observation(), Generator()
    engine = InferenceEngine(model, mode="eager")
    monkeypatch.setattr(engine, "mode", "graph")
    monkeypatch.setattr(Runner, "__init__", failed)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with pytest.warns(UserWarning, match="previous error during capture$"):
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    assert torch.equal(actions, model.sample_actions(observation, noise=noise_of(), num_steps=1))
    assert (generator.state, engine._memory.pool) == ("a copy", "new")


@pytest.mark.parametrize("error", [ImportError("no triton"), RuntimeError("undefined symbol")])
def test_missing_or_broken_triton_is_replaced_with_one_warning(error, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr("torchpi.engine.engine.triton_kernels", fails)
    with pytest.warns(UserWarning, match=f"runs without fused kernels: {error}"):
        assert _best_kernels(make_model(dtype=torch.bfloat16), "graph") is PLAIN


def test_failing_fused_kernels_are_replaced_with_one_warning():
    def broken(*args, **options):
        raise OSError("no C compiler")

    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager", kernels=dataclasses.replace(PLAIN, name="triton", attend=broken))
    with pytest.warns(UserWarning, match="PyTorch's operations replace the fused kernels, which fail here: no C"):
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.sample_actions(make_observation((40,)), noise=noise_of(1), num_steps=1)
    expected = model.sample_actions(observation, noise=noise_of(), num_steps=1)
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    assert engine.metadata["kernels"] == "plain"
    assert len(engine.metadata["warm_buckets"]) == 2


def test_num_steps_must_be_positive():
    engine = InferenceEngine(make_model(), mode="eager")
    with pytest.raises(ValueError, match="num_steps must be a positive integer, got 0"):
        engine.sample_actions(make_observation(), noise=noise_of(), num_steps=0)


def test_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in the tests only
    with pytest.raises(ValueError, match="Unknown engine 'Eager'; expected one of eager, compiled, graph"):
        InferenceEngine(make_model(), mode="Eager")


def test_inputs_of_wrong_size_raise_the_models_error(monkeypatch):
    """Copying to a bucket's static tensors would silently broadcast them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks shapes in the tests only
    model, observation = make_model(pi05=False), make_observation()
    engine, samples = InferenceEngine(model, mode="eager"), {"noise": noise_of(), "num_steps": 1}
    engine.sample_actions(observation, **samples)
    pixel = {name: image[:, :1, :1] for name, image in observation.images.items()}
    chunk, one = noise_of(), noise_of()[:1]
    cases = {
        "28×28 pixels, got 1×1": (dataclasses.replace(observation, images=pixel), {}),
        r"got \[3, 1\]": (dataclasses.replace(observation, state=observation.state[:, :1]), {}),
        r"guidance.target must be \[3, 7, 6\]": (observation, {"guidance": Guidance(one, chunk)}),
        r"guidance.weight must be \[3, 7, 6\]": (observation, {"guidance": Guidance(chunk, chunk[:, :, :1])}),
        r"prefix.mask must be \[3, 7\]": (observation, {"action_prefix": ActionPrefix(chunk, chunk[:1, :, 0] > 0)}),
        r"Noise must be \[3, 7, 6\] float32, got \[3": (observation, {"noise": chunk[:, :0]}),
    }
    for message, (inputs, changed) in cases.items():
        for sampler in (model, engine):
            with pytest.raises(ValueError, match=message.replace(" float32", "")):
                sampler.sample_actions(inputs, **{**samples, **changed})


def test_batch_without_samples_is_refused():
    model = make_model()
    for sampler in (model, InferenceEngine(model, mode="eager")):
        with pytest.raises(ValueError, match=r"Noise must be \[B, 7, 6\], got \[0, 7, 6\]"):
            sampler.sample_actions(make_observation(()), noise=noise_of(0), num_steps=1)


@pytest.mark.parametrize("maximum", [float("nan"), float("inf"), -1.0])
def test_guidance_without_a_finite_maximum_is_refused(maximum):
    with pytest.raises(ValueError, match="maximum must be finite and not negative"):
        Guidance(noise_of(), noise_of(), maximum)


def test_callers_settings_do_not_affect_the_bucket():
    """Settings matter neither in the call that warms up a bucket nor in later ones."""
    model, observation, samples = make_model(), make_observation(), {"noise": noise_of(), "num_steps": 2}
    engine = InferenceEngine(model, mode="eager")
    expected = model.sample_actions(observation, **samples)
    for settings in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.enable_grad()):
        with settings:
            actions = engine.sample_actions(observation, **samples)
        torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype):
    model, observation, samples = make_model(), make_observation(), {"num_steps": 2, **conditions(("guidance",))}
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    expected = model.sample_actions(observation, generator=generators[0], **samples)
    torch.set_default_dtype(dtype)
    try:
        weight = prefix_weights(HORIZON, DELAYS, torch.tensor([3, 2, 3]))
        actual = model.sample_actions(observation, generator=generators[1], **samples)
        engine = InferenceEngine(model, mode="eager")
        of_engine = engine.sample_actions(observation, generator=generators[2], **samples)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight, samples["guidance"].weight[:, :, 0])
    assert torch.equal(actual, expected)
    torch.testing.assert_close(of_engine, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.slow
def test_forked_process_warms_up_its_own_buckets():
    """In a process with one thread, which torch needs before a fork."""
    program = "import test_engine; test_engine.sample_in_a_fork()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=pathlib.Path(__file__).parent, timeout=100)


def sample_in_a_fork() -> None:
    torch.set_num_threads(1)
    engine = InferenceEngine(make_model(), mode="eager")
    engine.sample_actions(make_observation(), noise=noise_of(), num_steps=1)
    process = os.fork()
    if process == 0:
        engine.sample_actions(make_observation(), noise=noise_of(), num_steps=2)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


class FakeCuda:
    """The part of `torch.cuda` that the engine uses, with a log of calls and graphs that call their function again."""

    def __init__(self):
        self.log, self.current, self.runner = [], "a", None

    def install(self, monkeypatch, engine):
        cuda = self

        class Stream:
            def __init__(self, name="warm-up"):
                self.name = name

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits")

        class Event:
            def record(self, stream):
                cuda.log.append(f"recorded on {stream.name}")

        class Graph:
            def replay(self):
                cuda.log.append("replay")
                (runner,) = engine._runners.values()
                runner.samples.actions.copy_(runner._sample().actions)

        @contextlib.contextmanager
        def use(stream):
            cuda.log.append(f"on {stream.name}")
            yield

        @contextlib.contextmanager
        def graph(graph, pool, stream, capture_error_mode):
            cuda.log.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
            yield

        for name, fake in {
            "Stream": lambda device: Stream(),
            "stream": use,
            "graph": graph,
            "CUDAGraph": Graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.current))
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # these objects are not torch's
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        engine._memory, engine._last_call = GraphMemory(engine.device), Event()
        engine._memory.stream.name = "captures"


def test_graph_is_captured_once_and_replayed_with_new_inputs_after_the_last_call(monkeypatch):
    """Graphs share memory and inputs, and a lock on the host does not wait for the work of another stream."""
    model, cuda = make_model(), FakeCuda()
    engine = InferenceEngine(model, mode="eager")
    cuda.install(monkeypatch, engine)
    for stream, lengths in (("a", (17, 9, 12)), ("b", (3, 20, 31))):
        cuda.current, samples = stream, {"noise": noise_of(), "num_steps": 2}
        actions = engine.sample_actions(make_observation(lengths), **samples)
        expected = model.sample_actions(make_observation(lengths), **samples)
        torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    capture = ["warm-up waits for a", "on warm-up", "a waits for warm-up"]
    capture += ["on captures", "capture in pool on captures, thread_local"]
    assert cuda.log == [*capture, "a waits", "replay", "recorded on a", "b waits", "replay", "recorded on b"]


def test_closed_engine_samples_cold_buckets_with_the_model():
    model, observation, samples = make_model(), make_observation(), {"noise": noise_of(), "num_steps": 1}
    engine = InferenceEngine(model, mode="eager", background=True)
    engine.close()
    assert torch.equal(engine.sample_actions(observation, **samples), model.sample_actions(observation, **samples))
    assert engine.metadata["warm_buckets"] == []


def test_interrupt_ends_the_warm_up_and_a_later_call_restarts_it(monkeypatch):
    def interrupted(bucket: Bucket) -> None:
        raise KeyboardInterrupt

    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "warm_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    assert len(engine.metadata["warm_buckets"]) == 1


def test_model_samples_while_the_bucket_warms_up(monkeypatch):
    model, observation = make_model(), make_observation()
    engine = InferenceEngine(model, mode="eager", background=True)
    may_warm_up, is_warm = threading.Event(), threading.Event()
    warm_up = engine.warm_up

    def held(bucket: Bucket) -> None:
        assert may_warm_up.wait(60)
        warm_up(bucket)
        is_warm.set()

    monkeypatch.setattr(engine, "warm_up", held)
    expected = model.sample_actions(observation, noise=noise_of(), num_steps=1)
    for _ in range(2):
        assert torch.equal(engine.sample_actions(observation, noise=noise_of(), num_steps=1), expected)
    assert engine.metadata["warm_buckets"] == []
    may_warm_up.set()
    assert is_warm.wait(60)
    assert len(engine.metadata["warm_buckets"]) == 1
    actions = engine.sample_actions(observation, noise=noise_of(), num_steps=1)
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    engine.close()


def test_threads_share_the_warm_up_of_a_cold_bucket(monkeypatch):
    model, observation = make_model(), make_observation()
    engine, warmed = InferenceEngine(model, mode="eager"), []
    warm_up, both_asked = engine.warm_up, threading.Barrier(2)

    def counted(bucket: Bucket) -> None:
        warmed.append(bucket)
        both_asked.wait(60)
        warm_up(bucket)

    monkeypatch.setattr(engine, "warm_up", counted)
    threads = [
        threading.Thread(
            target=engine.sample_actions, args=(observation,), kwargs={"noise": noise_of(), "num_steps": 1}
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    both_asked.wait(60)
    for thread in threads:
        thread.join()
    assert len(warmed) == 1
    assert len(engine.metadata["warm_buckets"]) == 1


def test_calls_of_two_threads_do_not_mix():
    model = make_model()
    engine = InferenceEngine(model, mode="eager")
    observations = [make_observation(lengths) for lengths in ((17, 9, 12), (3, 20, 31))]
    expected = [model.sample_actions(each, noise=noise_of(), num_steps=2) for each in observations]
    results: list[list[torch.Tensor]] = [[], []]

    def sample(which: int) -> None:
        for _ in range(10):
            results[which].append(engine.sample_actions(observations[which], noise=noise_of(), num_steps=2))

    threads = [threading.Thread(target=sample, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert len(results[which]) == 10
        for actions in results[which]:
            torch.testing.assert_close(actions, expected[which], rtol=1e-5, atol=5e-6)


def test_policy_samples_with_an_engine_and_reports_it():
    policy = torchpi.load_policy("demo", device="cpu")
    assert policy.metadata["engine"] == {"mode": "eager"}
    observation = policy.example_observation()
    noise = noise_for(policy)
    expected = policy.infer(observation, noise=noise, num_steps=2)["actions"]
    continued = policy.infer(observation, noise=noise, num_steps=2, action_prefix=expected[2:], delay=1)["actions"]
    policy.engine = InferenceEngine(policy.model, mode="eager")
    torch.testing.assert_close(policy.infer(observation, noise=noise, num_steps=2)["actions"], expected)
    again = policy.infer(observation, noise=noise, num_steps=2, action_prefix=expected[2:], delay=1)["actions"]
    torch.testing.assert_close(again, continued, rtol=1e-4, atol=1e-5)
    assert policy.metadata["engine"]["mode"] == "eager"
    assert len(policy.metadata["engine"]["warm_buckets"]) == 2


def noise_for(policy):
    config = policy.model.config
    return noise_of_shape(config.action_horizon, config.action_dim)


def noise_of_shape(horizon, action_dim):
    return torch.randn(horizon, action_dim, generator=torch.Generator().manual_seed(5)).numpy()


def test_graph_engine_for_a_policy_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="captures CUDA graphs"):
        torchpi.load_policy("demo", device="cpu", engine="graph")


def compare_compiled(pi05: bool, rtc: tuple[str, ...]) -> None:
    model, observation = make_model(pi05=pi05), make_observation()
    engine = InferenceEngine(model, mode="compiled")
    actions = engine.sample_actions(observation, noise=noise_of(), num_steps=3, **conditions(rtc))
    expected = model.sample_actions(observation, noise=noise_of(), num_steps=3, **conditions(rtc))
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    assert len(engine.metadata["warm_buckets"]) == 1
    if rtc:
        return
    torch.set_num_threads(3 - torch.get_num_threads() % 2)  # recompiles, beyond torch.compile's default limit
    with torch._dynamo.config.patch(recompile_limit=1):
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=3, **conditions(rtc))
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    with torch.device("cpu"):
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=3)
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=5e-6)
    with FlopCounterMode(display=False), warnings.catch_warnings(record=True) as caught:  # cannot be compiled
        actions = engine.sample_actions(observation, noise=noise_of(), num_steps=3)
    assert torch.equal(actions, expected)
    assert "The plain model samples in place of compiled code" in str(caught[-1].message)


@pytest.mark.slow
@pytest.mark.parametrize("rtc", [(), ("guidance", "action_prefix")], ids=["plain", "rtc"])
@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
def test_compiled_engine_samples_the_models_actions(pi05, rtc):
    """In a process without shape checks, which torch.compile cannot trace."""
    program = f"import test_engine; test_engine.compare_compiled({pi05}, {rtc})"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=pathlib.Path(__file__).parent)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_engine_is_copied_with_its_model_and_settings(copied):
    engine, samples = InferenceEngine(make_model(), mode="eager", max_buckets=3), {"noise": noise_of(), "num_steps": 2}
    expected = engine.sample_actions(make_observation(), **samples)
    other = copied(engine)
    assert torch.equal(other.sample_actions(make_observation(), **samples), expected)
    assert (other.mode, other.max_buckets) == ("eager", 3)
    assert other.model is not engine.model


def test_engine_built_in_inference_mode_supports_guidance_outside():
    model, arguments = make_model(), {"noise": noise_of(), "num_steps": 2, **conditions(("guidance",))}
    with torch.inference_mode():
        engine = InferenceEngine(model, mode="eager")
        inside = engine.sample_actions(make_observation(), **arguments)
    torch.testing.assert_close(engine.sample_actions(make_observation(), **arguments), inside)
