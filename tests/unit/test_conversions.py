"""Conversions keep actions: normalization is rewritten for the target's rules, and weights keep every bit."""

import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

import torchpi
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.openpi import JaxArrays, write_params
from torchpi.checkpoints.openpi_torch import stated_dtype
from torchpi.convert import convert
from torchpi.transforms.normalize import (
    Normalization,
    NormStats,
    load_norm_stats,
    normalize,
    rewrite_stats,
    unnormalize,
)

DIM = 7
NAMES = tuple(f"joint_{i}" for i in range(DIM))
RULES = [
    Normalization(kind, eps)
    for kind, eps in itertools.product(("z_score", "quantile", "identity"), ("openpi", "lerobot"))
]
MODES = {"z_score": "MEAN_STD", "quantile": "QUANTILES", "min_max": "MIN_MAX", "identity": "IDENTITY"}
FORMATS = ("torchpi", "openpi-jax", "openpi-pytorch", "lerobot")


def stats_of(mean, std, **quantiles):
    return NormStats(np.array(mean), np.array(std), **{name: np.array(value) for name, value in quantiles.items()})


def some_stats(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=DIM), scale * rng.uniform(0.3, 2, DIM)
    return NormStats(mean, std, q01=mean - 1.9 * std, q99=mean + 2.3 * std)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("openpi-jax", {"default_prompt": "lift it"}, "A checkpoint of openpi can't store default_prompt"),
        ("torchpi", {"sizes": {"width": 3}}, "width can't be adapted; action_dim, "),
    ],
)
def test_impossible_conversions_are_errors(to, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert("demo", tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


# Statistics for another normalization rule


@pytest.mark.parametrize("target", [rule for rule in RULES if rule.kind != "identity"])
@pytest.mark.parametrize("rule", RULES)
def test_rewritten_statistics_give_the_same_numbers(rule, target):
    for seed, scale in enumerate((1e-2, 1.0, 100.0)):
        assert_same_numbers(rule, target, seed, scale)


def assert_same_numbers(rule, target, seed, scale):
    stats = some_stats(seed, scale)
    x = (stats.mean + scale * np.linspace(-3, 3, 11)[:, None]).astype(np.float32)
    new, constant = rewrite_stats(stats, rule, target, what="state", names=NAMES)
    one, other = normalize(x, stats, rule), normalize(x, new, target)
    np.testing.assert_allclose(other, one, atol=2e-5 * np.abs(one).max() + 1e-7 * np.abs(x / scale).max())
    new, _ = rewrite_stats(stats, rule, target, what="actions", names=NAMES)
    y = np.random.default_rng(seed).standard_normal((5, DIM)).astype(np.float32)
    one, other = unnormalize(y, stats, rule), unnormalize(y, new, target)
    assert (np.abs(one - other) <= 2e-5 * 2 * scale + 1e-6 * np.abs(one)).all()
    assert constant == []


def test_mean_and_std_become_quantiles_including_eps():
    stats = stats_of([1.0, 2.0], [0.5, 3.0])
    new, _ = rewrite_stats(
        stats, Normalization("z_score", "openpi"), Normalization("quantile", "openpi"), what="state", names=("a", "b")
    )
    np.testing.assert_allclose(new.q01, stats.mean - stats.std - 1e-6, atol=1e-14)
    np.testing.assert_allclose(new.q99, stats.mean + stats.std, atol=1e-14)
    assert (new.mean.tolist(), new.std.tolist()) == ([1.0, 2.0], [0.5, 3.0])


def test_same_rule_leaves_statistics_unchanged():
    stats = some_stats()
    for rule in RULES:
        assert (
            rewrite_stats(stats, rule, Normalization(rule.kind, rule.eps_rule), what="state", names=NAMES)[0] is stats
        )
    assert rewrite_stats(stats, RULES[4], RULES[5], what="state", names=NAMES)[0] is stats


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.kind != "identity"])
@pytest.mark.parametrize("target", [Normalization("z_score", "openpi"), Normalization("quantile", "openpi")])
def test_constant_dimension_keeps_its_value_and_is_named(rule, target):
    stats = stats_of([1.0, 3.0, 0.0], [0.5, 0.0, 0.0], q01=[0.0, 3.0, 0.0], q99=[2.0, 3.0, 0.0])
    new, constant = rewrite_stats(stats, rule, target, what="state", names=("x", "grip", "unused"))
    assert constant == ([] if rule == target else ["grip", "unused"]) or (rule, target) == (RULES[0], RULES[2])
    x = np.array([0.3, 3.0, 0.0])
    np.testing.assert_allclose(normalize(x, new, target), normalize(x, stats, rule), atol=1e-5)


def test_range_below_the_eps_is_an_error():
    stats = stats_of([0.0, 0.0], [0.5, 1e-7])
    with pytest.raises(
        ValueError, match="can't be expressed as quantile with openpi's eps for actions thumb: the range"
    ):
        rewrite_stats(
            stats, Normalization("z_score", "lerobot"), Normalization("quantile"), what="actions", names=("x", "thumb")
        )


def test_only_the_robots_dimensions_are_checked():
    padded = stats_of([0.0, 0.0], [0.5, 1e-7])
    new, constant = rewrite_stats(
        padded, Normalization("z_score", "lerobot"), Normalization("quantile"), what="actions", names=("x",)
    )
    assert (new.dim, constant) == (2, [])


# Policies


def lerobot(golden, root, state="z_score", actions=None, stats=None, dtype=None):
    """A LeRobot policy for a robot with fewer joints than the golden one, and with other normalization rules."""
    root = shutil.copytree(golden.root / "lerobot", root)
    norm_map = {"VISUAL": "IDENTITY", "STATE": MODES[state], "ACTION": MODES[actions or state]}
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        document = json.loads((root / name).read_text())
        settings = [step.get("config", {}) for step in document.get("steps", ())]
        for features in [config["features"] for config in settings if "features" in config] + [
            document.get(key, {}) for key in ("input_features", "output_features")
        ]:
            for key in {"observation.state", "action"} & features.keys():
                features[key]["shape"] = [DIM]
        for config in settings:
            if "norm_map" in config:
                config["norm_map"] = norm_map
        (root / name).write_text(json.dumps(document))
    for file in root.glob("policy_*.safetensors"):
        arrays = safetensors.torch.load_file(file)
        for name in [name for name in arrays if name.startswith(("observation.state.", "action."))]:
            arrays[name] = arrays[name][:DIM].to(dtype or arrays[name].dtype).clone()
        if stats is not None:
            stats(arrays)
        safetensors.torch.save_file(arrays, file)
    return root


def as_used(root, like, golden, full):
    """A checkpoint as its own program uses it; for openpi, with the policy's robot."""
    if open_checkpoint(root, config=full).format in ("torchpi", "lerobot"):
        return torchpi.load_policy(root, config=golden.config, truncation="original")
    tokenizer = golden.root.parent / "tokenizer" / "tiny_spm.model"
    return torchpi.load_policy(root, config=full, embodiment=like.embodiment, tokenizer=tokenizer)


def actions(policy, prompt="open the drawer"):
    rng = np.random.default_rng(0)
    request = {
        camera.key: rng.integers(0, 256, (3, 224, 224), np.uint8) for camera in policy.embodiment.cameras if camera.key
    }
    request["observation.state"] = np.linspace(-0.5, 0.5, DIM).astype(np.float32)
    config = policy.model.config
    noise = rng.standard_normal((config.action_horizon, config.action_dim)).astype(np.float32)
    return policy.infer(request | {"prompt": prompt}, noise=noise, num_steps=2)["actions"]


def assert_same_actions(found, expected, tolerance=2e-5):
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


@pytest.mark.parametrize(
    ("to", "state", "act"), [("openpi-jax", "z_score", None), ("openpi-pytorch", "identity", "min_max")]
)
def test_conversion_to_openpi_normalization_keeps_actions(golden_pi05, tmp_path, to, state, act):
    policy = torchpi.load_policy(lerobot(golden_pi05, tmp_path / "policy", state, act), config=golden_pi05.config)
    report = convert(tmp_path / "policy", tmp_path / "out", to, config=golden_pi05.config)
    there = as_used(tmp_path / "out", policy, golden_pi05, policy.model.config)
    assert {rule.kind for rule in there.transforms.normalization.values()} == {"quantile"}
    assert_same_actions(actions(there), actions(policy))
    assert report.action_difference < 1e-5
    assert report.action_difference < report.input_difference  # LeRobot resizes images differently
    printed = str(report)
    assert f"normalization of state changes from {state} with lerobot's eps to quantile with openpi's" in printed
    assert "q01 and q99, which are no longer quantiles of the data, are rewritten" in printed


def test_lerobot_pi0_with_quantiles_differs_in_openpi_only_by_prompt_cleaning(golden_pi0, tmp_path):
    golden = golden_pi0
    policy = torchpi.load_policy(lerobot(golden, tmp_path / "policy", "quantile", "z_score"), config=golden.config)
    report = convert(tmp_path / "policy", tmp_path / "out", "openpi-jax", config=golden.config)
    there = as_used(tmp_path / "out", policy, golden, policy.model.config)
    assert_same_actions(actions(there), actions(policy))
    assert report.action_difference < 1e-5 < 1e-2 < report.input_difference
    assert "note: openpi cleans the prompt" in str(report)
    assert f"white space around it, _ or newlines, by {report.input_difference:g}" in str(report)


def test_quantiles_are_added_for_openpi(golden_pi05, tmp_path):
    def cut(arrays):
        for name in [name for name in arrays if name.endswith((".q01", ".q99"))]:
            del arrays[name]

    policy = torchpi.load_policy(lerobot(golden_pi05, tmp_path / "policy", stats=cut), config=golden_pi05.config)
    convert(tmp_path / "policy", tmp_path / "out", "openpi-jax", config=golden_pi05.config, check=False)
    state = load_norm_stats(next(tmp_path.glob("out/assets/*/norm_stats.json")))["state"]
    own = policy.transforms.norm_stats["state"]
    np.testing.assert_allclose((state.q01, state.q99), (own.mean - own.std, own.mean + own.std), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lerobot_statistics_may_have_any_float_dtype(golden_pi05, tmp_path, dtype):
    exact = torchpi.load_policy(lerobot(golden_pi05, tmp_path / "exact"), config=golden_pi05.config)
    policy = torchpi.load_policy(lerobot(golden_pi05, tmp_path / "policy", dtype=dtype), config=golden_pi05.config)
    expected = torch.tensor(exact.transforms.norm_stats["state"].mean.tolist()).to(dtype).double().numpy()
    np.testing.assert_array_equal(policy.transforms.norm_stats["state"].mean, expected)


def test_statistics_for_lerobot_include_openpis_eps(golden_pi0, tmp_path):
    convert(
        lerobot(golden_pi0, tmp_path / "policy"), tmp_path / "own", "torchpi", config=golden_pi0.config, check=False
    )
    document = json.loads((tmp_path / "own" / "policy.json").read_text())
    document["normalization"] = {key: {"kind": "z_score", "eps_rule": "openpi"} for key in ("state", "actions")}
    (tmp_path / "own" / "policy.json").write_text(json.dumps(document))
    stats = json.loads((tmp_path / "own" / "norm_stats.json").read_text())
    stats["norm_stats"]["actions"]["std"] = [1e-4] * DIM  # an eps of 1e-6 is a hundredth of it
    (tmp_path / "own" / "norm_stats.json").write_text(json.dumps(stats))
    report = convert(tmp_path / "own", tmp_path / "out", "lerobot")
    written = safetensors.torch.load_file(next(tmp_path.glob("out/*unnormalizer*.safetensors")))
    np.testing.assert_allclose(written["action.std"], 1.01e-4, rtol=1e-6)
    assert report.action_difference < 2e-5 * 1e-4 + 5e-7
    assert "normalization of actions changes from z_score with openpi's eps to z_score with lerobot's" in str(report)


def test_base_without_statistics_notes_its_normalization(golden_pi05, tmp_path):
    root = lerobot(golden_pi05, tmp_path / "base", stats=dict.clear)
    report = convert(root, tmp_path / "out", "openpi-pytorch", config=golden_pi05.config, check=False)
    assert "the source normalizes state by z_score and actions by z_score, openpi both by quantile" in str(report)


def test_statistics_of_openpi_policy_are_rewritten_for_its_normalization(golden_pi05, tmp_path):
    robot = {"embodiment": torchpi.load_policy(golden_pi05.root / "lerobot", config=golden_pi05.config).embodiment}
    convert(
        golden_pi05.checkpoint,
        tmp_path / "out",
        "openpi-jax",
        config=golden_pi05.config,
        **robot,
        normalization="z_score",
        check=False,
    )
    before, after = (
        load_norm_stats(next(root.glob("assets/*/norm_stats.json")))["state"]
        for root in (golden_pi05.checkpoint, tmp_path / "out")
    )
    np.testing.assert_allclose(after.q99, before.mean + before.std, rtol=1e-12)


def test_additional_cameras_are_refused_and_renamed_ones_noted_for_openpi(golden_pi05, tmp_path):
    root = lerobot(golden_pi05, tmp_path / "policy")
    document = json.loads((root / "config.json").read_text())
    features = document["input_features"]
    features["observation.images.top"] = features.pop("observation.images.right_wrist_0_rgb")
    (root / "config.json").write_text(json.dumps(document))
    report = convert(root, tmp_path / "out", "openpi-jax", config=golden_pi05.config, check=False)
    assert "its cameras base_0_rgb, left_wrist_0_rgb, top become openpi's base_0_rgb, left_wrist_0_rgb, right" in str(
        report
    )
    features["observation.images.side"] = features["observation.images.top"]
    (root / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="has the cameras base_0_rgb, left_wrist_0_rgb, top, side; openpi reads"):
        convert(root, tmp_path / "more", "openpi-jax", config=golden_pi05.config)
    assert not (tmp_path / "more").exists()


# Dtypes


def dtypes(root):
    return {name: array.dtype for name, array in safetensors.torch.load_file(root / "model.safetensors").items()}


def port_in_bfloat16(golden, root):
    """openpi's PyTorch checkpoint as saved by a bfloat16 training: norms and patch embeddings are float32."""
    shutil.copytree(golden.root / "openpi_pytorch", root)
    wide = ("patch_embedding", "position_embedding", "layernorm", "model.norm")
    arrays = safetensors.torch.load_file(root / "model.safetensors")
    arrays = {k: v if any(w in k for w in wide) else v.bfloat16() for k, v in arrays.items()}
    safetensors.torch.save_file(arrays, root / "model.safetensors")
    return root


def same_numbers(root, other, config):
    one, two = (torchpi.load_model(path, config=config).state_dict() for path in (root, other))
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("through", ["lerobot", *(pytest.param(to, marks=pytest.mark.slow) for to in FORMATS[:2])])
def test_arrays_keep_their_dtypes(golden_pi05, tmp_path, through):
    source, config = port_in_bfloat16(golden_pi05, tmp_path / "port"), golden_pi05.config
    robot = torchpi.load_policy(golden_pi05.root / "lerobot", config=config).embodiment
    tokenizer = golden_pi05.root.parent / "tokenizer" / "tiny_spm.model"
    said = {} if through.startswith("openpi") else {"embodiment": robot, "tokenizer": tokenizer}
    report = convert(source, tmp_path / "between", through, config=config, **said)
    assert (report.dtype, report.array_difference) == ("bfloat16 and float32", 0)
    assert "rounded" not in str(report)
    known = None if through == "torchpi" else config
    convert(tmp_path / "between", tmp_path / "out", "openpi-pytorch", config=known, check=False)
    assert dtypes(tmp_path / "out") == dtypes(source)
    assert same_numbers(source, tmp_path / "out", config)


def test_float32_arrays_next_to_bfloat16_ones_are_kept(golden_pi05, tmp_path):
    arrays = JaxArrays(golden_pi05.checkpoint / "params")
    half = {name for name in arrays.shapes if name.startswith("PaliGemma") and "_1" not in name}
    root = shutil.copytree(golden_pi05.checkpoint, tmp_path / "mixed")
    shutil.rmtree(root / "params")
    (root / "params").mkdir()
    write_params(
        root / "params", arrays.shapes, lambda n: arrays.read(n, torch.bfloat16 if n in half else torch.float32)
    )
    report = convert(root, tmp_path / "port", "openpi-pytorch", config=golden_pi05.config)
    assert (report.array_difference, report.action_difference) == (0, 0)
    assert same_numbers(root, tmp_path / "port", golden_pi05.config)
    # With bfloat16 in config.json, loading would round the action expert.
    assert json.loads((tmp_path / "port" / "config.json").read_text())["precision"] == "float32"
    again = convert(tmp_path / "port", tmp_path / "again", "openpi-jax", config=golden_pi05.config, check=False)
    assert again.dtype == "bfloat16 and float32"
    assert JaxArrays(tmp_path / "again" / "params").dtypes == JaxArrays(root / "params").dtypes


def test_rounding_is_noted_with_its_largest_error(golden_pi05, tmp_path):
    weights = golden_pi05.model().state_dict().values()
    largest = max(float((value - value.bfloat16().float()).abs().max()) for value in weights)
    said = f"weights are rounded, by at most {largest:g}"
    for source, to in ((golden_pi05.checkpoint, "openpi-pytorch"), (golden_pi05.root / "openpi_pytorch", "openpi-jax")):
        for dtype in (torch.bfloat16, torch.float32):
            target = tmp_path / f"{source.name} {dtype}"
            report = convert(source, target, to, config=golden_pi05.config, dtype=dtype, check=False)
            assert (said in str(report)) == ("rounded" in str(report)) == (dtype is torch.bfloat16)


def test_folded_lora_weights_are_float32_and_others_keep_their_dtype(golden_root, tmp_path):
    lora = golden_root / "lora" / "pi05"
    arrays = JaxArrays(lora / "jax_ckpt" / "100" / "params")
    (tmp_path / "frozen" / "params").mkdir(parents=True)
    half = {n for n in arrays.shapes if "lora" not in n and n.startswith("PaliGemma")}
    write_params(
        tmp_path / "frozen" / "params", arrays.shapes, lambda n: arrays.read(n, torch.bfloat16 if n in half else None)
    )
    config, alpha = golden_root / "pi05" / "model_config.json", (8.0, 3.0)
    convert(tmp_path / "frozen", tmp_path / "out", "openpi-jax", config=config, lora_alpha=alpha, check=False)
    written = JaxArrays(tmp_path / "out" / "params").dtypes
    folded = open_checkpoint(tmp_path / "frozen").folded
    assert {written[name] for name in folded} == {torch.float32}
    assert {written[name] for name in half - {*folded}} == {torch.bfloat16}
    one = torchpi.load_model(tmp_path / "frozen", config=config, lora_alpha=alpha).state_dict()
    two = torchpi.load_model(tmp_path / "out", config=config).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_config_json_states_bfloat16_only_if_lerobot_rounds_no_array():
    body = "model.paligemma_with_expert.paligemma.model."
    half = {f"{body}language_model.layers.0.mlp.up_proj.weight": torch.bfloat16}
    assert stated_dtype(half) == "bfloat16"
    assert (
        stated_dtype({**half, f"{body}vision_tower.x": torch.float32, "model.action_in_proj.weight": torch.float32})
        == "bfloat16"
    )
    assert stated_dtype({**half, f"{body}language_model.layers.0.mlp.down_proj.weight": torch.float32}) == "float32"


# All pairs and chains


def step_to(here, there, to, first, golden):
    """Convert, adding what openpi's formats do not store, and compare the actions under the target's rules."""
    full, tokenizer = first.model.config, golden.root.parent / "tokenizer" / "tiny_spm.model"
    needs = open_checkpoint(here, config=full).format.startswith("openpi") and not to.startswith("openpi")
    # All images have the model's size, so that no program resizes them.
    said = {"embodiment": first.embodiment, "tokenizer": tokenizer, "preprocessing": "openpi"} if needs else {}
    convert(here, there, to, config=full, check=False, **said)
    assert_same_actions(actions(as_used(there, first, golden, full)), actions(first))


@pytest.mark.parametrize(
    "chain",
    [("openpi-pytorch", "lerobot"), pytest.param(("openpi-jax", "torchpi", "lerobot"), marks=pytest.mark.slow)],
)
def test_chain_of_conversions_keeps_actions(golden_pi05, tmp_path, chain):
    first = torchpi.load_policy(lerobot(golden_pi05, tmp_path / "0", "quantile", "z_score"), config=golden_pi05.config)
    for i, to in enumerate(chain):
        step_to(tmp_path / str(i), tmp_path / str(i + 1), to, first, golden_pi05)


@pytest.mark.slow
@pytest.mark.parametrize(("state", "act"), [*((mode, mode) for mode in MODES), ("quantile", "z_score")])
def test_conversion_between_any_two_formats_keeps_actions(golden, tmp_path, state, act):
    first = torchpi.load_policy(lerobot(golden, tmp_path / "0", state, act), config=golden.config)
    for source in FORMATS:
        step_to(tmp_path / "0", tmp_path / source, source, first, golden)
        for target in FORMATS:
            step_to(tmp_path / source, tmp_path / f"{source} to {target}", target, first, golden)
