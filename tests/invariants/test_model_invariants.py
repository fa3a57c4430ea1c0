"""Invariants of the model for any weights: masked and padded inputs have no effect, batch rows are independent."""

import dataclasses

import jaxtyping
import pytest
import torch

import torchpi
from torchpi.config import PRESETS, GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.flow import posemb_sincos, sample_time
from torchpi.model.layers import attend, gelu_tanh


def observe(golden, **changes):
    return torchpi.Observation.from_dict({**golden.observation_dict(), **changes})


def sample(golden, model, observation, noise=None):
    return model.sample_actions(observation, noise=golden.inputs["noise"] if noise is None else noise)


@pytest.fixture(scope="module")
def model(golden):
    return golden.model()


def plain_sample(model, observation, noise, num_steps=10):
    """Sample without optimizations: keep the padding, and compute the time conditioning in every step."""
    cache = model.prefill(observation)
    x_t, t, dt = noise, torch.tensor(1.0), -1.0 / num_steps
    for _ in range(num_steps):
        x_t = x_t + dt * model.denoise_step(cache, x_t, t.expand(noise.shape[0]))
        t = t + dt
    return x_t


@torch.no_grad()
def test_dropping_padding_and_absent_cameras_changes_nothing(golden, model):
    observation, noise = golden.observation(), golden.inputs["noise"]
    assert not all(mask.all() for mask in observation.image_masks.values())
    assert not observation.tokenized_prompt_mask.all(dim=0).all()
    assert (sample(golden, model, observation) - plain_sample(model, observation, noise)).abs().max() <= 5e-6


@torch.no_grad()
def test_drop_padding_keeps_exactly_the_valid_tokens(golden, model):
    observation = golden.observation()
    tokens, mask, _ = model.embed_prefix(observation)
    kept, kept_mask, kept_ar_mask = model.embed_prefix(observation, drop_padding=True)
    assert kept_ar_mask.shape == kept_mask.shape[1:]
    assert kept_mask.shape[1] == mask.sum(dim=1).max()
    for row in range(len(mask)):
        assert (kept[row][kept_mask[row]] - tokens[row][mask[row]]).abs().max() <= 5e-6


def test_batch_rows_are_independent(golden, model):
    together = sample(golden, model, golden.observation())
    for i in range(2):
        alone = golden.observation_dict()
        for group in ("image", "image_mask"):
            alone[group] = {camera: value[i : i + 1] for camera, value in alone[group].items()}
        for key in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
            alone[key] = alone[key][i : i + 1]
        actions = sample(golden, model, torchpi.Observation.from_dict(alone), golden.inputs["noise"][i : i + 1])
        assert (actions - together[i : i + 1]).abs().max() <= 5e-6


@pytest.mark.parametrize("garbage", [0.7, float("nan"), float("inf")])
def test_pixels_of_masked_camera_change_nothing(golden, model, garbage):
    observation = golden.observation()
    reference = sample(golden, model, observation)
    loss_inputs = {name: golden.inputs[name] for name in ("noise", "time")}
    loss = model.compute_loss(observation, golden.inputs["actions"], **loss_inputs)
    for camera, mask in observation.image_masks.items():
        observation.images[camera][~mask] = garbage
    assert torch.equal(sample(golden, model, observation), reference)
    assert torch.equal(model.compute_loss(observation, golden.inputs["actions"], **loss_inputs), loss)


def test_values_at_padding_change_nothing(golden, model):
    data = golden.observation_dict()
    tokens = data["tokenized_prompt"].clone()
    tokens[~data["tokenized_prompt_mask"]] = 17
    changed = observe(golden, tokenized_prompt=tokens)
    assert torch.equal(sample(golden, model, changed), sample(golden, model, golden.observation()))


def test_longer_padding_changes_nothing(golden, model):
    data = golden.observation_dict()
    longer = {key: torch.nn.functional.pad(data[key], (0, 23)) for key in ("tokenized_prompt", "tokenized_prompt_mask")}
    observation, wider = golden.observation(), observe(golden, **longer)
    assert (sample(golden, model, wider) - sample(golden, model, observation)).abs().max() <= 5e-6
    given = {name: golden.inputs[name] for name in ("noise", "time")}
    difference = model.compute_loss(wider, golden.inputs["actions"], **given) - model.compute_loss(
        observation, golden.inputs["actions"], **given
    )
    assert difference.abs().max() <= 5e-6


def test_camera_absent_everywhere_equals_omitting_it(golden, model):
    data = golden.observation_dict()
    absent = {**data["image_mask"], "left_wrist_0_rgb": torch.zeros(2, dtype=torch.bool)}
    fewer = {
        group: {camera: value for camera, value in data[group].items() if camera != "left_wrist_0_rgb"}
        for group in ("image", "image_mask")
    }
    masked = sample(golden, model, observe(golden, image_mask=absent))
    assert (sample(golden, model, observe(golden, **fewer)) - masked).abs().max() <= 5e-6


def test_sampling_without_any_camera_is_finite(golden, model):
    data = golden.observation_dict()
    none = {camera: torch.zeros(2, dtype=torch.bool) for camera in data["image_mask"]}
    observation = observe(golden, image_mask=none)
    actions = sample(golden, model, observation)
    with torch.no_grad():
        assert (actions - plain_sample(model, observation, golden.inputs["noise"])).abs().max() <= 5e-6


def test_order_of_cameras_matters(golden, model):
    data = golden.observation_dict()
    turned = {group: dict(reversed(data[group].items())) for group in ("image", "image_mask")}
    difference = sample(golden, model, observe(golden, **turned)) - sample(golden, model, golden.observation())
    assert difference.abs().max() > 1e-3


def test_noise_comes_from_the_generator(golden, model):
    observation = golden.observation()
    chunks = [model.sample_actions(observation, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(chunks[0], chunks[1])
    assert not torch.equal(chunks[0], chunks[2])
    losses = [
        model.compute_loss(observation, golden.inputs["actions"], generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_time_is_drawn_if_only_noise_is_passed(golden_pi05):
    model, observation, actions = golden_pi05.model(), golden_pi05.observation(), golden_pi05.inputs["actions"]
    noise = golden_pi05.inputs["noise"]
    time = sample_time(len(noise), generator=torch.Generator().manual_seed(3), device=noise.device)
    drawn = model.compute_loss(observation, actions, noise=noise, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, model.compute_loss(observation, actions, noise=noise, time=time))
    with pytest.raises(ValueError, match="dim must be even"):
        posemb_sincos(time, 7)


def test_arguments_that_are_not_an_observation_a_count_or_a_time_are_errors(golden, model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    observation, actions, noise = golden.observation(), golden.inputs["actions"], golden.inputs["noise"]
    for call in (model.sample_actions, model.sample_many, model.prefill, model.embed_prefix):
        with pytest.raises(ValueError, match=r"must be an Observation, got dict; Observation.from_dict makes one"):
            call(golden.observation_dict())
    with pytest.raises(ValueError, match="must be an Observation, got dict"):
        model.compute_loss(golden.observation_dict(), actions)
    for count in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"flow_samples_per_obs must be a positive integer, got {count!r}"):
            model.compute_loss(observation, actions, flow_samples_per_obs=count)
        with pytest.raises(ValueError, match=f"num_samples must be a positive integer, got {count!r}"):
            model.sample_many(observation, num_samples=count)
    for time in (-0.5, 7.0, float("nan")):
        with pytest.raises(ValueError, match=rf"Time must be in \[0, 1\], .* got values from {time:g} to"):
            model.compute_loss(observation, actions, time=torch.full((len(actions),), time))
    with pytest.raises(ValueError, match="Time must be a float32 tensor, got float"):
        model.compute_loss(observation, actions, noise=noise, time=0.5)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_num_steps_must_be_a_positive_integer(golden, model, num_steps):
    with pytest.raises((ValueError, TypeError)):
        model.sample_actions(golden.observation(), noise=golden.inputs["noise"], num_steps=num_steps)


def test_wrong_horizon_is_an_error(golden, model):
    with pytest.raises(ValueError, match="Noise must be"):
        model.sample_actions(golden.observation(), noise=golden.inputs["noise"][:, 1:])


def test_wrong_image_size_is_an_error(golden, model):
    data = golden.observation_dict()
    small = {camera: image[:, :112, :112] for camera, image in data["image"].items()}
    with pytest.raises(ValueError, match="resize_with_pad"):
        model.embed_prefix(observe(golden, image=small))


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 3)])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_queries_equal_repeated_keys(masked, heads):
    """Each of the G key/value heads serves Q/G consecutive query heads."""
    num_heads, num_kv = heads
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, num_heads, 8, generator=generator)
    k, v = (torch.randn(2, 7, num_kv, 8, generator=generator) for _ in range(2))
    mask = (torch.rand(2, 5, 7, generator=generator) > 0.3) if masked else None
    if mask is not None:
        mask[:, :, 0] = True
    repeated = [x.repeat_interleave(num_heads // num_kv, dim=2).transpose(1, 2) for x in (k, v)]
    logits = q.transpose(1, 2) @ repeated[0].mT / 8**0.5
    logits = logits if mask is None else logits.masked_fill(~mask[:, None], -torch.inf)
    plain = (logits.softmax(-1) @ repeated[1]).transpose(1, 2).flatten(2)
    assert (attend(q, k, v, mask) - plain).abs().max() <= 1e-6


def test_model_runs_at_other_sizes():
    """Two cameras of 56 pixels, several key/value heads, a sinusoidal position embedding."""
    config = Pi0Config(
        pi05=True,
        paligemma_variant=GemmaConfig(width=48, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8),
        action_expert_variant=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8),
        siglip_variant=VisionConfig(width=32, depth=1, mlp_dim=48, num_heads=2, patch=14, position="sincos2d"),
        action_dim=5,
        action_horizon=3,
        max_token_len=9,
        vocab_size=40,
        image_size=56,
    )
    model = torchpi.Pi0(config)
    generator = torch.Generator().manual_seed(1)
    observation = torchpi.Observation.from_dict(
        {
            "image": {
                name: torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=generator) for name in "ab"
            },
            "state": torch.zeros(2, 5),
            "tokenized_prompt": torch.randint(0, 40, (2, 9), generator=generator),
            "tokenized_prompt_mask": torch.tensor([[True] * 4 + [False] * 5, [True] * 9]),
        }
    )
    noise = torch.randn(2, 3, 5, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and head are initialized with 0, which would hide differences
                parameter.normal_(std=0.1, generator=generator)
        difference = model.sample_actions(observation, noise=noise) - plain_sample(model, observation, noise)
    assert difference.abs().max() <= 5e-6


def test_fast_gelu_equals_plain_gelu():
    x = torch.cat([torch.linspace(-12, 12, 10_001), torch.tensor([0.0, -1e30, 1e30, 1e-30])])
    plain = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    with torch.no_grad():
        fast = gelu_tanh(x)
    assert (fast - plain).abs().max() <= 1e-6
    assert (gelu_tanh(x) - plain).abs().max() <= 1e-6


@pytest.mark.parametrize("pi05", [True, False])
def test_prefill_and_denoise_step_read_no_value_on_the_host(pi05):
    """Reading a value of a tensor on "meta" raises, as dropping the padding does."""
    config = Pi0Config.from_dict({"pi05": pi05}, base=PRESETS["tiny" if pi05 else "tiny_pi0"])
    model = torchpi.Pi0(config, device="meta")
    with torch.device("meta"):
        observation = torchpi.Observation.from_dict(
            {
                "image": {name: torch.empty(2, 96, 96, 3) for name in "ab"},
                "image_mask": {name: torch.empty(2, dtype=torch.bool) for name in "ab"},
                "state": torch.empty(2, 8),
                "tokenized_prompt": torch.empty(2, 64, dtype=torch.int64),
                "tokenized_prompt_mask": torch.empty(2, 64, dtype=torch.bool),
            }
        )
        noise, time = torch.empty(2, 16, 8), torch.empty(2)
    with torch.no_grad():
        cache = model.prefill(observation)
        assert model.denoise_step(cache, noise, time).shape == noise.shape
        for conditioning in model.time_conditionings([1.0, 0.5]):
            assert model.denoise_step(cache, noise, conditioning).shape == noise.shape
    assert model(observation, noise, noise=noise, time=time).shape == (2, 16)
    with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():
        model.embed_prefix(observation, drop_padding=True)


@torch.no_grad()
def test_suffix_is_written_after_the_prefix_in_one_buffer(golden, model):
    """Every step uses the same buffers and does not change the prefix in them."""
    cache = model.prefill(golden.observation())
    prefix = [keys[:, :length].clone() for keys, _, length in cache.key_values]
    pointers = [keys.data_ptr() for keys, _, _ in cache.key_values]
    first = model.denoise_step(cache, golden.inputs["noise"], golden.inputs["time"])
    model.denoise_step(cache, golden.outputs["x_t"], golden.inputs["time"])
    assert torch.equal(model.denoise_step(cache, golden.inputs["noise"], golden.inputs["time"]), first)
    for (keys, _, length), before, pointer in zip(cache.key_values, prefix, pointers, strict=True):
        assert keys.data_ptr() == pointer
        assert keys.shape[1] > length
        assert torch.equal(keys[:, :length], before)


def test_shapes_that_would_be_broadcast_are_errors(golden, model, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # as for users, for whom jaxtyping does not check shapes
    observation, actions = golden.observation(), golden.inputs["actions"]
    flow = {"noise": golden.inputs["noise"], "time": golden.inputs["time"]}
    with pytest.raises(ValueError, match=r"prefix_len must be \[2\], got \[1\]"):
        model(observation, actions, **flow, prefix_len=torch.tensor([3]))
    mask = torch.ones(2, *actions.shape[:0:-1], dtype=torch.bool)  # the same number of elements
    with pytest.raises(ValueError, match="loss_mask must be"):
        model(observation, actions, **flow, loss_mask=mask)
    with torch.no_grad():
        cache = model.prefill(observation)
        for x_t in (actions[:1], actions[:, 1:]):
            with pytest.raises(ValueError, match=r"x_t of this cache must be .* \[2, \d+, \d+\], got"):
                model.denoise_step(cache, x_t, golden.inputs["time"][: len(x_t)])
        for time in (torch.ones(3), torch.ones(2, 1), 0.5):
            with pytest.raises(ValueError, match=r"time must be a float32 tensor \[2\] or \[2, \d+\], got"):
                model.denoise_step(cache, actions, time)
    with pytest.raises(ValueError, match="noisy_actions must be"):
        model.embed_suffix(observation, actions[..., 1:], flow["time"])
    with pytest.raises(ValueError, match=r"timestep must be a float32 tensor \[2\], got \[1\]"):
        model.embed_suffix(observation, actions, flow["time"][:1])
    with pytest.raises(ValueError, match="Noise must be a float32 tensor, got ndarray"):
        model.sample_actions(observation, noise=flow["noise"].numpy())
    with pytest.raises(ValueError, match="Time must be a float32 tensor, got ndarray"):
        model(observation, actions, noise=flow["noise"], time=flow["time"].numpy())


def test_token_ids_out_of_range_are_an_error(golden, model):
    observation = golden.observation()
    vocab = model.config.vocab_size
    foreign = dataclasses.replace(observation, tokenized_prompt=observation.tokenized_prompt + vocab)
    with pytest.raises(ValueError, match=f"the model's embedding has 0 to {vocab - 1}"):
        model.embed_prefix(foreign)
