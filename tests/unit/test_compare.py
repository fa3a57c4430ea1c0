"""`torchpi compare`: two policies that are the same, and the first difference of others."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from test_policy import ACTION_DIM, QUANTILE, TWO_JOINTS, random_model, request, small_config, stats

from torchpi.inspect import compare_policies
from torchpi.inspect.commands import plain_console, run_compare
from torchpi.inspect.text import print_compared
from torchpi.policy import Policy, load_policy
from torchpi.randomness import generator_at
from torchpi.robots import Camera, Embodiment, get_embodiment
from torchpi.transforms import Normalization, NormStats, save_norm_stats

BASE = "base_0_rgb"


@pytest.fixture
def make_policy(golden_root):
    def make(config=None, embodiment=TWO_JOINTS, **fields):
        defaults = {
            "norm_stats": {"state": stats(ACTION_DIM), "actions": stats(ACTION_DIM)},
            "normalization": QUANTILE,
            "tokenizer": golden_root / "tokenizer" / "tiny_spm.model",
        }
        return Policy(random_model(config or small_config()), get_embodiment(embodiment), **(defaults | fields))

    return make


def compare(a, b, observation=None, **options):
    return compare_policies(a, b, observation or request(a), **({"num_steps": 2} | options))


def stage(comparison, name):
    return next(entry for entry in comparison.stages if entry.name == name)


@pytest.mark.parametrize("pi05", [True, False])
def test_policy_equals_itself(make_policy, pi05):
    policy = make_policy(small_config(pi05))
    comparison = compare(policy, copy.deepcopy(policy), tolerance=0.0)
    assert comparison.same
    assert comparison.status == 0
    assert [entry.name for entry in comparison.stages] == [
        "cameras",
        "state",
        "normalized state",
        "prompt text",
        "token ids",
        f"image {BASE}",
        "image left_wrist_0_rgb",
        f"image tokens {BASE}",
        "image tokens left_wrist_0_rgb",
        "prefix tokens",
        "cache layer 0 keys",
        "cache layer 0 values",
        "cache layer 1 keys",
        "cache layer 1 values",
        "v_t at t = 1",
        "action chunk, normalized",
        "actions, robot's units",
    ]
    assert all(entry.max_abs == 0 for entry in comparison.stages if entry.shape is not None)
    assert stage(comparison, "cache layer 0 keys").shape[1:] == (1, 8)


def test_last_stage_equals_the_actions_of_infer(make_policy):
    """The last stage of each policy equals `Policy.infer` with the noise of the seed."""
    policy = make_policy(embodiment="aloha")
    other = copy.deepcopy(policy)
    other.model.action_out_proj.bias.data += 0.5
    observation = request(policy)
    found = stage(compare(policy, other, observation, seed=3), "actions, robot's units")
    noise = generator_at(3, "compare").standard_normal((4, ACTION_DIM)).astype(np.float32)
    ours, theirs = (p.infer(observation, noise=noise, num_steps=2)["actions"] for p in (policy, other))
    assert found.max_abs == pytest.approx(abs(ours - theirs).max(), abs=1e-5)
    assert found.scale == pytest.approx(max(abs(ours).max(), abs(theirs).max()), abs=1e-5)


def reversed_tokens(policy):
    encode = policy.transforms.tokenizer.encode
    policy.transforms.tokenizer.encode = lambda text, add_bos: encode(text, add_bos)[::-1]


def other_statistics(key):
    def change(policy):
        norm_stats = {
            **policy.transforms.norm_stats,
            key: NormStats(*(0.9 * part for part in vars(stats(16)).values())),
        }
        policy.transforms = dataclasses.replace(policy.transforms, norm_stats=norm_stats)

    return change


def other_kind(policy):
    rules = {**policy.transforms.normalization, "state": Normalization("z_score")}
    policy.transforms = dataclasses.replace(policy.transforms, normalization=rules)


def other_weight(name):
    def change(policy):
        parameter = policy.model.get_parameter(name)
        parameter.data.view(-1)[0] += 1.0

    return change


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (other_statistics("state"), "normalized state"),
        (other_kind, "normalized state"),
        (reversed_tokens, "token ids"),
        (other_weight("vision.patch_embed.bias"), f"image tokens {BASE}"),
        (other_weight("vision.blocks.0.fc1.weight"), f"image tokens {BASE}"),
        (lambda policy: policy.model.embedding.data.mul_(1.01), "prefix tokens"),
        (other_weight("backbone.layers.0.attention.qkv.weight"), "cache layer 1 keys"),  # a query's
        (other_weight("backbone.layers.0.feed_forward.down.weight"), "cache layer 1 keys"),
        (other_weight("expert.layers.0.attention.out.weight"), "v_t at t = 1"),
        (other_weight("action_out_proj.bias"), "v_t at t = 1"),
        (other_statistics("actions"), "actions, robot's units"),
    ],
)
def test_first_differing_stage_is_reported(make_policy, change, first):
    one, other = make_policy(), make_policy()
    change(other)
    for comparison in (compare(one, other), compare(other, one)):
        assert comparison.status == 1
        assert comparison.first_difference == first


def test_tolerance_is_relative_to_the_scale(make_policy):
    one, other = make_policy(), make_policy()
    other.model.vision.head.bias.data[0] += 1e-5
    name = f"image tokens {BASE}"
    found = stage(compare(one, other), name)
    assert found.max_abs == pytest.approx(1e-5, rel=0.1)
    assert not found.differs
    assert compare(one, other, tolerance=found.max_abs / found.scale * 0.9).first_difference == name
    assert stage(compare(one, other, tolerance=found.max_abs / found.scale * 1.1), name).differs is False
    with pytest.raises(ValueError, match="tolerance must not be negative, got -1"):
        compare(one, other, tolerance=-1.0)


def test_non_finite_number_differs_and_stops_the_comparison(make_policy, capsys):
    one, other = make_policy(), make_policy()
    other.model.expert.layers[0].attention.out.weight.data[0, 0] = math.nan
    comparison = compare(one, other)
    assert comparison.first_difference == "v_t at t = 1"
    assert stage(comparison, "v_t at t = 1").message == "NaN or infinity in B"
    assert stage(comparison, "actions, robot's units").message == "only A has it"
    assert comparison.stopped[0].startswith("B stopped: NaN or infinity in the model's action chunk")
    print_compared(comparison, plain_console(), title="A and B")
    printed = capsys.readouterr().out
    assert "B stopped: NaN or infinity in the model's action chunk" in printed
    assert "The first stage that differs is: v_t at t = 1." in printed
    alike = dataclasses.replace(comparison, stages=comparison.stages[:2])
    print_compared(alike, plain_console(), title="A and B")
    assert "Every stage that both reached is the same." in capsys.readouterr().out
    document = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert document["first_difference"] == "v_t at t = 1"


# Other sizes and settings


def test_padding_changes_no_stage(make_policy):
    one, other = make_policy(), make_policy(small_config(max_token_len=150))
    comparison = compare(one, other)
    assert comparison.settings == ("model.max_token_len: 200 in A, 150 in B",)
    assert comparison.first_difference is None
    assert comparison.status == 1


def test_a_masked_camera_changes_no_stage(make_policy):
    robot = dataclasses.replace(TWO_JOINTS, cameras=(*TWO_JOINTS.cameras, Camera("right_wrist_0_rgb", None, "masked")))
    comparison = compare(make_policy(), make_policy(embodiment=robot))
    assert comparison.first_difference is None
    assert comparison.settings == ("embodiment.cameras: 2 entries in A, 3 entries in B",)


def test_robot_names_are_not_compared(make_policy):
    robot = dataclasses.replace(TWO_JOINTS, name="another", asset_id="two", metadata={"a": 1})
    assert compare(make_policy(), make_policy(embodiment=robot)).same


def test_different_sizes_are_listed_and_equal_shapes_compared(make_policy):
    one, other = make_policy(), make_policy(small_config(action_horizon=6))
    comparison = compare(one, other)
    assert comparison.settings == ("model.action_horizon: 4 in A, 6 in B",)
    assert comparison.first_difference == "v_t at t = 1"
    assert stage(comparison, "v_t at t = 1").message == "shapes differ: A [4, 16], B [6, 16]"
    wide = dataclasses.replace(one.model.config.paligemma, width=24)
    comparison = compare(one, make_policy(small_config(paligemma_variant=wide)))
    assert comparison.first_difference == f"image tokens {BASE}"
    assert "shapes differ: A [4, 16], B [4, 24]" in stage(comparison, f"image tokens {BASE}").message
    assert stage(comparison, "v_t at t = 1").shape == (4, 16)
    assert "model.paligemma.width: 16 in A, 24 in B" in comparison.settings


def test_pi0_and_pi05_differ_first_in_the_prompt(make_policy):
    comparison = compare(make_policy(), make_policy(small_config(pi05=False)))
    assert comparison.first_difference == "prompt text"
    assert "A 'Task: " in stage(comparison, "prompt text").message
    assert "model.pi05: true in A, false in B" in comparison.settings


def test_unset_horizon_is_taken_from_the_other_policy(make_policy):
    unset = make_policy(small_config(action_horizon=None))
    comparison = compare(make_policy(), unset)
    assert comparison.first_difference is None
    assert comparison.settings == ("model.action_horizon: 4 in A, null in B",)
    with pytest.raises(ValueError, match="action_horizon is not set"):
        compare(unset, unset)


def test_policy_that_cannot_read_the_observation_is_reported(make_policy):
    robot = Embodiment.generic("other", cameras={BASE: "top"}, state=["x"], actions=["x"])
    comparison = compare(make_policy(), make_policy(embodiment=robot))
    assert comparison.status == 1
    assert "B stopped" in comparison.stopped[0]
    assert comparison.first_difference == "cameras"
    assert stage(comparison, "cameras").message == "only A has it"
    with pytest.raises(ValueError, match=r"Neither policy can read the observation\. A: .*front.*B: .*front"):
        compare(make_policy(), make_policy(), {"state": np.zeros(2), "prompt": "go"})


def test_policies_of_a_robot_without_state_are_compared(make_policy):
    robot = Embodiment.generic("arm", cameras={BASE: "front"}, state=[], actions=["a", "b"], command="velocity")
    policy = make_policy(embodiment=robot, default_prompt="push it")
    comparison = compare(policy, copy.deepcopy(policy), policy.example_observation())
    assert comparison.same
    assert stage(comparison, "state").shape == (0,)


def test_different_cameras_differ(make_policy):
    robot = dataclasses.replace(TWO_JOINTS, cameras=TWO_JOINTS.cameras[::-1])
    comparison = compare(make_policy(), make_policy(embodiment=robot))
    assert comparison.first_difference == "cameras"
    assert stage(comparison, "cameras").message == f"A '{BASE}, left_wrist_0_rgb', B 'left_wrist_0_rgb, {BASE}'"
    assert not stage(comparison, f"image {BASE}").differs


# The command


@pytest.fixture
def files(make_policy, tmp_path):
    """Two folders with the same policy, and an observation."""
    policy = make_policy()
    for name in "ab":
        policy.save(tmp_path / name)
    np.savez(tmp_path / "observation.npz", **request(policy))
    return {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "observation": tmp_path / "observation.npz"}


def test_json_is_one_document(files, capsys):
    assert run_compare(**files, as_json=True, device="cpu") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["same"] is True
    assert document["first_difference"] is None
    assert document["a"] == files["a"]
    assert {entry["name"] for entry in document["stages"]} >= {"prompt text", "v_t at t = 1"}


def test_report_names_the_first_difference(files, capsys, tmp_path):
    assert run_compare(**files, device="cpu") == 0
    assert "Every stage is the same, within 0.0001 of its scale." in capsys.readouterr().out
    policy = load_policy(files["b"], device="cpu", default_prompt="wave")
    policy.model.expert.layers[1].attention.out.weight.data += 0.1
    policy.save(files["b"], overwrite=True)
    assert run_compare(**files, device="cpu") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "The first stage that differs is: v_t at t = 1." in out
    assert 'prompt.default: null in A, "wave" in B' in out


def test_checkpoint_equals_its_policy_folder(golden_root, tmp_path, capsys):
    """Options complete the checkpoint; the policy folder keeps its own settings."""
    one = NormStats(np.zeros(7), np.ones(7), -np.ones(7), np.ones(7))
    save_norm_stats(tmp_path / "stats.json", {"state": one, "actions": one})
    load = {
        "config": str(golden_root / "pi0" / "model_config.json"),
        "embodiment": "libero",
        "norm_stats": tmp_path / "stats.json",
        "tokenizer": golden_root / "tokenizer" / "tiny_spm.model",
    }
    source = str(golden_root / "pi0" / "jax_ckpt_pure")
    policy = load_policy(source, device="cpu", **load)
    policy.save(tmp_path / "folder")
    np.savez(tmp_path / "observation.npz", **request(policy))
    files = {"observation": tmp_path / "observation.npz", "device": "cpu"}
    assert run_compare(source, str(tmp_path / "folder"), **files, **load) == 0
    other = load | {"normalization": "quantile"}
    assert run_compare(source, str(tmp_path / "folder"), **files, **other) == 1
    assert 'normalization.state.kind: "quantile" in A, "z_score" in B' in capsys.readouterr().out


def test_options_are_refused_for_two_policy_folders(files, golden_root):
    with pytest.raises(ValueError, match="are policy folders, which are complete; omit --lora-alpha"):
        run_compare(**files, lora_alpha=(16.0, 32.0))
    golden = golden_root / "pi05"
    sides = {"a": str(golden / "jax_ckpt_pure"), "b": str(golden / "openpi_pytorch")}
    load = {"config": str(golden / "model_config.json"), "embodiment": "libero"}
    with pytest.raises(ValueError, match="lora_alpha= belongs to a checkpoint with LoRA weights"):
        run_compare(**sides, observation=files["observation"], lora_alpha=(16.0, 32.0), **load)
    with pytest.raises(ValueError, match="embedding='lm_head' belongs to a PyTorch checkpoint that stores"):
        run_compare(sides["a"], files["b"], observation=files["observation"], embedding="lm_head", **load)


def test_missing_input_is_an_error(files):
    with pytest.raises(FileNotFoundError):
        run_compare(files["a"], files["b"] + "x", observation=files["observation"])
    with pytest.raises(FileNotFoundError, match="There is no file"):
        run_compare(files["a"], files["b"], observation=files["observation"].with_name("none.npz"))
