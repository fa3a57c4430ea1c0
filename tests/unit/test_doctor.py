"""`torchpi doctor`: a healthy policy has no problem, and each defect is named."""

import copy
import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
from test_policy import ACTION_DIM, TWO_JOINTS, random_model, request, small_config, stats

from torchpi import inspect
from torchpi.config import GemmaConfig
from torchpi.demo.frames import demo_observation, demo_tasks
from torchpi.inspect import diagnose
from torchpi.inspect.commands import run_doctor
from torchpi.inspect.diagnosis import IGNORED_BELOW, RULES
from torchpi.inspect.sensitivity import OTHER_INSTRUCTION, sample_chunks
from torchpi.inspect.statistics import excess
from torchpi.policy import Policy, load_policy
from torchpi.randomness import generator_at
from torchpi.robots import Camera, Embodiment, get_embodiment
from torchpi.transforms import Normalization, NormStats

QUICK = {"num_seeds": 3, "num_steps": 2}
BASE, WRIST = "base_0_rgb", "left_wrist_0_rgb"


@pytest.fixture(scope="module")
def demo():
    """Embedded policy; tests that change it use a copy."""
    return load_policy("demo", device="cpu")


@pytest.fixture
def damaged(demo):
    """A copy of the embedded policy to damage."""
    return copy.deepcopy(demo)


@pytest.fixture
def make_policy(golden_root):
    def make(config=None, embodiment=TWO_JOINTS, kind="quantile", **fields):
        defaults = {
            "norm_stats": {"state": stats(ACTION_DIM), "actions": stats(ACTION_DIM)},
            "normalization": {key: Normalization(kind) for key in ("state", "actions")},
            "tokenizer": golden_root / "tokenizer" / "tiny_spm.model",
        }
        return Policy(random_model(config or small_config()), get_embodiment(embodiment), **(defaults | fields))

    return make


@pytest.fixture
def file(tmp_path):
    """An observation of the embedded policy, as the command reads it."""
    np.savez(tmp_path / "observation.npz", **demo_observation())
    return tmp_path / "observation.npz"


def with_stats(policy, key, **changes):
    """Policy with changed statistics; a change is {index: value}."""
    entry = policy.transforms.norm_stats[key]
    arrays = {name: np.array(getattr(entry, name)) for name in ("mean", "std", "q01", "q99")}
    for name, values in changes.items():
        for index, value in values.items():
            arrays[name][index] = value
    norm_stats = {**policy.transforms.norm_stats, key: NormStats(**arrays)}
    policy.transforms = dataclasses.replace(policy.transforms, norm_stats=norm_stats)
    return policy


def findings(diagnosis, level, about=""):
    return [f.message for f in diagnosis.findings if f.level == level and f.about.startswith(about)]


def moves(diagnosis):
    return {entry.input: entry.moves for entry in diagnosis.observation.sensitivity}


# A healthy policy


@pytest.mark.parametrize(
    "task", [demo_tasks()[0], *(pytest.param(task, marks=pytest.mark.slow) for task in demo_tasks()[1:])]
)
def test_demo_policy_has_no_findings_and_uses_all_inputs(demo, task):
    diagnosis = diagnose(demo, demo_observation(task), num_seeds=4)
    assert diagnosis.status == 0
    assert not findings(diagnosis, "problem")
    assert not findings(diagnosis, "warning")
    expected = [f"camera {BASE}", f"camera {WRIST}", f"cameras {BASE} and {WRIST}", "instruction", "state"]
    assert list(moves(diagnosis)) == expected
    assert all(moved > 2 * IGNORED_BELOW for moved in moves(diagnosis).values())
    assert all(camera.found for camera in diagnosis.observation.cameras)
    assert not diagnosis.observation.prompt.cut


def test_demo_policy_has_no_findings_without_an_observation(demo):
    diagnosis = diagnose(demo)
    assert (diagnosis.status, diagnosis.findings, diagnosis.observation) == (0, (), None)
    said = diagnosis.policy
    assert said["variant"] == "π₀.₅"
    assert said["parameters"] == sum(p.numel() for p in demo.model.parameters())
    assert [camera["name"] for camera in said["cameras"]] == [BASE, WRIST]
    assert said["normalization"]["state"] == {"kind": "quantile", "eps_rule": "openpi"}
    assert (said["max_token_len"], said["action_horizon"], said["control_hz"]) == (64, 16, 80)
    assert said["state_input"] == "text in the prompt"
    assert said["provenance"] == demo.provenance


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("embodiment", ["aloha", "droid", "libero", TWO_JOINTS])
def test_every_robot_can_be_examined(make_policy, embodiment, pi05):
    policy = make_policy(small_config(pi05), embodiment)
    diagnosis = diagnose(policy, request(policy), **QUICK)
    assert len(diagnosis.observation.actions) == policy.embodiment.action_size
    assert not findings(diagnosis, "problem", "observation")
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_same_seed_gives_the_same_diagnosis(demo):
    one, same, other = (diagnose(demo, demo_observation(), seed=seed, **QUICK) for seed in (0, 0, 1))
    assert one.to_dict() == same.to_dict()
    assert moves(one) != moves(other)


def test_diagnosis_changes_nothing_and_keeps_later_warnings(damaged):
    policy = with_stats(damaged, "state", q01={3: 1.0}, q99={3: 1.0})
    observation = demo_observation() | {"joint_temperature": np.zeros(3)}
    diagnosis = diagnose(policy, observation, **QUICK)
    assert any("ignores joint_temperature" in message for message in findings(diagnosis, "warning", "observation"))
    with (
        pytest.warns(UserWarning, match="ignores joint_temperature"),
        pytest.warns(UserWarning, match="The statistics of state don't vary"),
    ):
        policy.prepare(observation)


def test_every_rule_of_the_table_is_applied():
    folder = pathlib.Path(inspect.__file__).parent
    code = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    assert [name for name, rule in RULES.items() if rule.beyond is None and f'"{name}"' not in code] == []
    by_distance = [name for name, rule in RULES.items() if rule.beyond is not None]
    assert all(name.startswith(("state_", "actions_")) for name in by_distance)


# Sensitivity


@pytest.mark.parametrize("pi05", [True, False])
def test_chunks_with_a_shared_prefix_equal_the_policys(make_policy, pi05):
    policy = make_policy(small_config(pi05), "libero")
    observation = request(policy)
    noise = generator_at(0, "test").standard_normal((3, 4, ACTION_DIM)).astype(np.float32)
    _, inputs = policy.prepare(observation)
    chunks = sample_chunks(policy, inputs, noise, num_steps=3)
    expected = policy.infer_batch([observation] * 3, noise=noise, num_steps=3)
    for ours, theirs in zip(chunks, expected, strict=True):
        actions = policy.embodiment.from_model(
            policy.transforms.inverse(ours, action_size=7), policy.prepare(observation)[0]
        )
        np.testing.assert_allclose(actions, theirs["actions"], rtol=0, atol=1e-5)


def test_measure_equals_its_definition(demo):
    observation = demo_observation()
    noise = generator_at(0, "doctor").standard_normal((3, 16, 8)).astype(np.float32)
    diagnosis = diagnose(demo, observation, **QUICK)
    blanked = observation | {"base": np.zeros_like(observation["base"])}
    base, variant = (
        np.stack([demo.transforms.inverse(c, action_size=4) for c in sampled])
        for sampled in (
            sample_chunks(demo, demo.prepare(sent)[1], noise, num_steps=2) for sent in (observation, blanked)
        )
    )
    half = demo.transforms.norm_stats["actions"]
    half = (half.q99 - half.q01 + 1e-6) / 2
    spread = np.sqrt((((base - base.mean(0)) / half) ** 2).mean())
    assert diagnosis.observation.spread == pytest.approx(spread, rel=1e-4)
    expected = np.sqrt((((variant - base) / half) ** 2).mean()) / spread
    assert moves(diagnosis)[f"camera {BASE}"] == pytest.approx(expected, rel=1e-4)


# Inputs that are ignored


def test_ignored_images_are_reported(damaged):
    torch.nn.init.zeros_(damaged.model.vision.head.weight)
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    assert diagnosis.status == 1
    for camera in (BASE, WRIST):
        (message,) = findings(diagnosis, "problem", f"camera {camera}")
        assert message.startswith(
            f"ignores the camera {camera}: the chunk moves by 0.00 of its spread when it is blanked"
        )
    assert not findings(diagnosis, "warning")  # swapping them gives no further information
    assert not findings(diagnosis, "problem", "instruction")


def test_only_the_ignored_camera_is_reported(damaged):
    damaged.model.vision.register_forward_hook(lambda module, args, out: out * torch.tensor([1.0, 0.0])[:, None, None])
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    assert [f.about for f in diagnosis.findings if f.level == "problem"] == [f"camera {WRIST}"]


def test_indistinguishable_cameras_are_reported(damaged):
    damaged.model.vision.register_forward_hook(lambda module, args, out: out.mean(0, keepdim=True).expand_as(out))
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    assert findings(diagnosis, "warning", "cameras")[0].startswith(
        f"the policy does not distinguish the cameras {BASE} and {WRIST}"
    )
    assert diagnosis.status == 0


def test_ignored_prompt_is_reported(damaged):
    """The tokens lose the instruction, as with a tokenizer that knows none of the words."""
    encode = damaged.transforms.tokenizer.encode
    damaged.transforms.tokenizer.encode = lambda text, add_bos: encode(
        re.sub("Task: .*, State", "Task: , State", text), add_bos
    )
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    (message,) = findings(diagnosis, "problem")
    assert message.startswith("ignores the instruction: the chunk moves by 0.00 of its spread when it is replaced by ")
    damaged.provenance["dataset"] = {"tasks": {"drawer-open": "open the drawer"}}
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    assert "one instruction only" in findings(diagnosis, "warning")[0]
    assert diagnosis.status == 0


def test_damaged_embeddings_are_reported(damaged):
    torch.nn.init.zeros_(damaged.model.embedding)
    diagnosis = diagnose(damaged, demo_observation(), other_instruction="open the window", **QUICK)
    assert findings(diagnosis, "problem", "instruction")
    assert not findings(diagnosis, "problem", "camera")


def test_ignored_state_is_reported(make_policy):
    policy = make_policy(small_config(pi05=False))
    policy.model.suffix.state_proj.weight.data *= 10
    healthy = diagnose(policy, request(policy), **QUICK)
    assert moves(healthy)["state"] > IGNORED_BELOW
    torch.nn.init.zeros_(policy.model.suffix.state_proj.weight)
    diagnosis = diagnose(policy, request(policy), **QUICK)
    assert findings(diagnosis, "problem", "state")[0].startswith("ignores the state: the chunk moves by 0.00")
    assert diagnosis.status == 1


def test_untried_inputs_are_listed_with_reasons(make_policy):
    policy = make_policy(small_config(discrete_state_input=False))
    black = np.zeros((28, 28, 3), np.uint8)
    observation = request(policy, front=black, wrist=black)
    diagnosis = diagnose(policy, observation, **QUICK)
    assert {entry.input: entry.untried for entry in diagnosis.observation.sensitivity if entry.moves is None} == {
        f"camera {BASE}": "it is already black",
        f"camera {WRIST}": "it is already black",
        f"cameras {BASE} and {WRIST}": "both images are the same",
        "state": "the policy does not read it",
    }
    assert "every pixel of the image is 0" in findings(diagnosis, "warning", f"camera {BASE}")[0]
    policy = make_policy()
    at_mean = request(policy, state=policy.transforms.norm_stats["state"].mean[:2])
    (state,) = [e for e in diagnose(policy, at_mean, **QUICK).observation.sensitivity if e.input == "state"]
    assert state.untried == "it is already near its mean"


def test_other_instruction_is_a_trained_one_or_made_up(demo, make_policy):
    def replaced(policy, observation, **options):
        found = diagnose(policy, observation, **QUICK, **options).observation.sensitivity
        return next(entry.change for entry in found if entry.input == "instruction")

    assert replaced(demo, demo_observation()) == "replaced by 'press the button from the top'"
    assert replaced(demo, demo_observation("window-close")) == "replaced by 'open the drawer'"
    assert replaced(demo, demo_observation(), other_instruction="wave") == "replaced by 'wave'"
    policy = make_policy()
    assert replaced(policy, request(policy)) == f"replaced by {OTHER_INSTRUCTION!r}"
    assert replaced(policy, request(policy, prompt=OTHER_INSTRUCTION)) == "replaced by 'wave'"


# Weights and actions


def test_weights_that_are_not_finite_are_reported_and_not_run(damaged):
    with torch.no_grad():
        damaged.model.expert.layers[1].attention.out.weight[0, 0] = math.nan
        damaged.model.embedding[5, 5] = math.inf
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    (message,) = findings(diagnosis, "problem")
    assert "NaN or infinity in embedding, expert.layers.1.attention.out.weight; expected finite numbers" in message
    assert diagnosis.status == diagnose(damaged).status == 1
    assert diagnosis.observation.state
    assert not diagnosis.observation.actions


def test_actions_that_are_not_finite_are_a_problem(damaged):
    damaged.model.action_out_proj.weight.data *= 1e38  # the weights themselves stay finite
    damaged.model.action_out_proj.bias.data.fill_(3.3e38)
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    (message,) = findings(diagnosis, "problem", "actions")
    assert "of the predicted numbers are NaN or infinite" in message
    assert not diagnosis.observation.sensitivity


def test_actions_far_outside_are_a_problem_in_the_robots_units(damaged):
    damaged.model.action_out_proj.bias.data[1] += 10
    diagnosis = diagnose(damaged, demo_observation(), **QUICK)
    (message,) = findings(diagnosis, "problem", "actions")
    assert re.search(r"predicted far outside .* delta_y from -\d.*\(training data: -1 to 1\)", message)
    check = diagnosis.observation.actions[1]
    assert check.outside == 1
    assert check.excess == pytest.approx((-1 - check.min) / 2, rel=1e-4)


@pytest.mark.parametrize("embodiment", ["aloha", "pi0_libero"])
def test_actions_and_their_range_are_in_the_robots_units(make_policy, embodiment):
    """Covers flipped joints, gripper commands, and deltas added to the state."""
    policy = make_policy(embodiment=embodiment)
    observation = request(policy)
    diagnosis = diagnose(policy, observation, **QUICK)
    noise = generator_at(0, "doctor").standard_normal((3, 4, ACTION_DIM)).astype(np.float32)
    chunks = policy.infer_batch([observation] * 3, noise=noise, num_steps=2)
    actions = np.concatenate([chunk["actions"] for chunk in chunks])
    checks = diagnosis.observation.actions
    np.testing.assert_allclose([check.min for check in checks], actions.min(0), atol=1e-4)
    np.testing.assert_allclose([check.max for check in checks], actions.max(0), atol=1e-4)
    own, state = policy.transforms.norm_stats["actions"], policy.prepare(observation)[0]
    ends = [policy.embodiment.from_model(q[None, : len(checks)], state)[0] for q in (own.q01, own.q99)]
    np.testing.assert_allclose([check.low for check in checks], np.minimum(*ends))
    np.testing.assert_allclose([check.high for check in checks], np.maximum(*ends))


def test_an_unset_horizon_is_a_problem_that_names_config(make_policy):
    policy = make_policy(small_config(action_horizon=None, max_token_len=None, discrete_state_input=None))
    diagnosis = diagnose(policy, request(policy), **QUICK)
    (message,) = findings(diagnosis, "problem")
    assert re.search(r"action_horizon is not set.*config=", message)
    assert diagnose(policy).status == 0


# Statistics


def test_excess_is_measured_in_widths_of_the_range():
    assert not excess(np.array([1e9, -1e9]), np.full(2, -np.inf), np.full(2, np.inf)).any()
    np.testing.assert_allclose(
        excess(np.array([-1.0, 1, 4.5]), np.zeros(3), np.full(3, 3.0)), [1 / 3, 0, 0.5], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("quantile", {"q01": {3: 0.25}, "q99": {3: 0.25}}), ("z_score", {"std": {3: 0.0}, "mean": {3: 0.25}})],
)
def test_state_that_differs_from_constant_statistics_is_a_problem(damaged, kind, changes):
    rules = {key: Normalization(kind) for key in ("state", "actions")}
    damaged.transforms = dataclasses.replace(damaged.transforms, normalization=rules)
    if kind == "z_score":
        stats = damaged.transforms.norm_stats
        plain = {key: NormStats(entry.mean, entry.std) for key, entry in stats.items()}
        damaged.transforms = dataclasses.replace(damaged.transforms, norm_stats=plain)
        state = plain["state"]
        mean, std = np.array(state.mean), np.array(state.std)
        mean[3], std[3] = 0.25, 0.0
        damaged.transforms = dataclasses.replace(damaged.transforms, norm_stats=plain | {"state": NormStats(mean, std)})
    else:
        with_stats(damaged, "state", **changes)
    without = diagnose(damaged)
    assert "gripper" in findings(without, "warning", "statistics of state")[0]
    assert without.status == 0

    def examined(gripper):
        observation = demo_observation()
        return diagnose(damaged, observation | {"state": np.array([*observation["state"][:3], gripper])}, **QUICK)

    assert not findings(examined(0.25), "problem", "state")
    off = examined(0.3)
    (message,) = findings(off, "problem", "state")
    assert "gripper is 0.3, but in the statistics it never varies from 0.25" in message
    assert off.status == 1


def test_constant_padding_in_the_statistics_is_not_reported(damaged):
    entry = damaged.transforms.norm_stats["state"]
    padded = NormStats(*(np.pad(getattr(entry, name), (0, 28)) for name in ("mean", "std", "q01", "q99")))
    damaged.transforms = dataclasses.replace(
        damaged.transforms, norm_stats={**damaged.transforms.norm_stats, "state": padded}
    )
    assert not diagnose(damaged).findings


def test_dimensions_that_hardly_move_give_a_warning(damaged):
    policy = with_stats(damaged, "actions", q01={0: 0.5}, q99={0: 0.5001})
    (message,) = findings(diagnose(policy), "warning", "statistics of actions")
    assert message.startswith("delta_x hardly moves")
    rules = {key: Normalization("z_score") for key in ("state", "actions")}
    policy.transforms = dataclasses.replace(policy.transforms, normalization=rules)
    assert not diagnose(policy).findings


def arm(unit, kind="absolute"):
    return dataclasses.replace(
        TWO_JOINTS,
        state=(dataclasses.replace(TWO_JOINTS.state[0], units=(unit, unit)),),
        actions=tuple(dataclasses.replace(action, unit=unit, kind=kind) for action in TWO_JOINTS.actions),
    )


def of(*ranges):
    low, high = np.array(ranges, float).T
    return NormStats((low + high) / 2, (high - low) / 4, low, high)


@pytest.mark.parametrize(
    ("unit", "ranges", "named"),
    [
        ("rad", [(-3, 3), (-90, 45)], "elbow reaches 90 rad; a robot's values stay below 12.57 in rad"),
        ("m", [(-800, 300), (0, 1)], "shoulder reaches 800 m; a robot's values stay below 10 in m"),
        ("opening, 0 to 1", [(0, 1), (0, 255)], "elbow reaches 255; a robot's values stay below 10"),
        ("", [(0, 1), (0, 65535)], "elbow reaches 6.554e+04; a robot's values stay below 1e+04 in any unit"),
        ("", [(0, 1), (-180, 4096)], None),
        ("rad", [(-3.2, 3.2), (-6.3, 6.3)], None),
    ],
)
def test_impossible_values_give_a_warning(make_policy, unit, ranges, named):
    policy = make_policy(embodiment=arm(unit), norm_stats={"state": of(*ranges), "actions": of(*ranges)})
    found = findings(diagnose(policy), "warning")
    assert [named is not None and message.startswith(named) for message in found] == [True] * (2 if named else 0)


@pytest.mark.parametrize(
    ("kind", "ranges", "is_named"),
    [
        ("absolute", [(-1, 1), (-60, 60)], True),  # degrees for a joint measured in rad
        ("absolute", [(-1, 1), (-3, 12)], False),
        ("delta", [(-0.1, 0.1), (-0.5, 0.5)], False),
        ("delta", [(-0.1, 0.1), (100, 101)], True),
    ],
)
def test_targets_far_from_recorded_states_give_a_warning(make_policy, kind, ranges, is_named):
    policy = make_policy(
        embodiment=arm("", kind), norm_stats={"state": of((-1, 1), (-1, 1.05)), "actions": of(*ranges)}
    )
    found = findings(diagnose(policy), "warning", "statistics of actions")
    assert [message.startswith("elbow ranges from") for message in found] == [True] * is_named


def test_statistics_of_another_width_give_a_warning(make_policy):
    policy = make_policy(small_config(action_dim=7), "libero", norm_stats={"state": stats(7), "actions": stats(7)})
    (message,) = findings(diagnose(policy), "warning", "statistics of state")
    assert message.startswith("they have fewer dimensions than the robot: the policy reads 7 of its 8 dimensions")
    policy = make_policy(norm_stats={"state": stats(2), "actions": stats(3)})
    (message,) = findings(diagnose(policy), "warning")
    assert "they vary beyond the 2 dimensions of two_joints" in message


def test_without_normalization_ranges_are_not_checked(make_policy):
    plain = NormStats(np.zeros(2), np.ones(2))
    policy = make_policy(
        norm_stats={"state": plain, "actions": plain},
        normalization={key: Normalization("identity", "lerobot") for key in ("state", "actions")},
    )
    diagnosis = diagnose(policy, request(policy, state=np.array([100.0, -100.0])), **QUICK)
    assert len(findings(diagnosis, "warning", "statistics")) == 2
    assert not findings(diagnosis, "problem", "state")
    assert diagnosis.to_dict()["observation"]["state"][0]["low"] is None


# Observations


def test_level_of_a_state_outside_follows_its_distance(demo):
    low, high = (demo.transforms.norm_stats["state"].q01, demo.transforms.norm_stats["state"].q99)

    def examined(*beyond):
        state = high + np.array(beyond) * (high - low)
        return diagnose(demo, demo_observation() | {"state": state}, **QUICK)

    inside = examined(-0.5, -0.5, -0.5, -0.5)
    assert inside.observation.state_outside == 0
    assert not any(finding.about == "state" for finding in inside.findings)
    diagnosis = examined(0.7, 0.3, 0.05, -0.5)
    assert diagnosis.observation.state_outside == 0.75
    assert [check.outside for check in diagnosis.observation.state] == [True, True, True, False]
    assert diagnosis.observation.state[0].excess == pytest.approx(0.7, rel=1e-4)
    for level, name in (("problem", "hand_x"), ("warning", "hand_y"), ("note", "hand_z")):
        (message,) = findings(diagnosis, level, "state")
        assert name in message
        assert message.count("(from") == 1
    assert diagnosis.status == 1
    assert examined(0.3, 0.3, -0.5, -0.5).status == 0


def test_without_quantiles_a_normal_distribution_gives_the_range(damaged):
    damaged.transforms = dataclasses.replace(
        damaged.transforms,
        norm_stats={key: NormStats(entry.mean, entry.std) for key, entry in damaged.transforms.norm_stats.items()},
        normalization={key: Normalization("z_score") for key in ("state", "actions")},
    )
    entry = damaged.transforms.norm_stats["state"]
    state = entry.mean + entry.std * [2.3, 2.4, -2.3, -2.4]
    diagnosis = diagnose(damaged, demo_observation() | {"state": state}, **QUICK)
    assert [check.outside for check in diagnosis.observation.state] == [False, True, False, True]


def test_a_prompt_that_is_too_long_is_a_problem(demo, make_policy):
    long = demo_observation() | {"prompt": "open the drawer and then close the drawer " * 10}
    diagnosis = diagnose(demo, long, **QUICK)
    prompt = diagnosis.observation.prompt
    assert prompt.cut
    assert prompt.text.startswith("Task: open the drawer and then close")
    assert (
        f"the prompt has {prompt.num_tokens} tokens, but the policy reads only 64"
        in findings(diagnosis, "problem", "prompt")[0]
    )
    assert diagnosis.status == 1
    policy = make_policy(small_config(max_token_len=3))
    diagnosis = diagnose(policy, request(policy), **QUICK)
    assert any("max_token_len 3 is too small" in message for message in findings(diagnosis, "problem", "observation"))


def test_reported_prompt_equals_the_tokenized_one(make_policy):
    for pi05, instruction, text in (
        (True, "pick_up the cube", "Task: pick up the cube, State: "),
        (False, "pick_up the cube", "pick up the cube\n"),
    ):
        policy = make_policy(small_config(pi05))
        observation = request(policy, prompt=instruction)
        prompt = diagnose(policy, observation, **QUICK).observation.prompt
        assert prompt.text.startswith(text)
        assert prompt.num_tokens == policy.prepare(observation)[1]["tokenized_prompt_mask"].sum()
    policy = make_policy(small_config(pi05=False), prompt_format="lerobot")
    assert diagnose(policy, observation, **QUICK).observation.prompt.text == "pick_up the cube\n"


def test_missing_camera_is_reported(demo, make_policy):
    observation = demo_observation()
    del observation["wrist"]
    diagnosis = diagnose(demo, observation, **QUICK)
    (message,) = findings(diagnosis, "problem")
    assert message.startswith("the observation has no image wrist, which metaworld requires")
    assert [check.found for check in diagnosis.observation.cameras] == [True, False]
    policy = make_policy(embodiment="aloha")
    observation = request(policy)
    del observation["images"]["cam_left_wrist"]
    diagnosis = diagnose(policy, observation, **QUICK)
    assert findings(diagnosis, "note", f"camera {WRIST}")[0].startswith("the observation has no image images.cam_left")
    assert not findings(diagnosis, "problem", "camera left")
    assert f"camera {WRIST}" not in moves(diagnosis)


def test_masked_camera_is_not_reported(make_policy):
    robot = dataclasses.replace(TWO_JOINTS, cameras=(*TWO_JOINTS.cameras, Camera("right_wrist_0_rgb", None, "masked")))
    policy = make_policy(embodiment=robot)
    diagnosis = diagnose(policy, request(policy), **QUICK)
    assert not any("right" in finding.about for finding in diagnosis.findings)
    assert [check.found for check in diagnosis.observation.cameras] == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros(3)}, r"State 'state' has shape \[3\]"),
        ({"state": np.full(4, np.nan)}, "NaN or infinity in state 'state'"),
        ({"third": np.zeros((8, 8, 3), np.uint8)}, "no camera 'third'"),
        ({"base": np.zeros((3, 8, 8), np.uint8)}, "transpose"),
        ({"prompt": 3}, "The prompt is of type int"),
    ],
)
def test_an_observation_that_cannot_be_read_is_a_problem(demo, changes, message):
    diagnosis = diagnose(demo, demo_observation() | changes, **QUICK)
    (found,) = findings(diagnosis, "problem", "observation")
    assert re.search(message, found)
    assert diagnosis.status == 1


def test_nested_and_flat_observations_are_the_same(make_policy):
    policy = make_policy(embodiment="aloha")
    nested = request(policy)
    flat = {f"images.{name}": image for name, image in nested["images"].items()}
    flat |= {key: value for key, value in nested.items() if key != "images"}
    one, other = (diagnose(policy, observation, **QUICK).to_dict() for observation in (nested, flat))
    assert one == other


# The command


def test_json_is_one_document(file, capsys):
    status = run_doctor("demo", observation=file, as_json=True, device="cpu")
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert status == document["status"] == 0
    assert document["policy"]["embodiment"] == "metaworld"
    assert len(document["observation"]["sensitivity"]) == 5
    assert document["observation"]["prompt"]["cut"] is False
    assert document["observation"]["state"][0]["outside"] is False


def test_gaps_that_stop_a_control_loop_are_notes(make_policy, demo):
    robot = dataclasses.replace(get_embodiment(TWO_JOINTS), execute_steps=99)
    beyond, unstated = findings(diagnose(make_policy(embodiment=robot)), "note", "robot")
    assert beyond.startswith("execute_steps is 99, but its chunk has only")
    assert unstated.startswith("no command is stated for shoulder, elbow, without which the control loop refuses")
    assert findings(diagnose(demo), "note", "robot") == []


def test_printed_report_has_every_part(file, capsys, tmp_path, damaged):
    assert run_doctor("demo", observation=file, device="cpu") == 0
    out, err = capsys.readouterr()
    said = [
        "π₀.₅",
        "metaworld",
        BASE,
        "80 Hz",
        "18 of 64 tokens",
        "Task: open the drawer",
        "delta_x",
        "set to its mean",
    ]
    assert [text for text in said if text not in out] == []
    assert "no findings" in out
    assert not err
    torch.nn.init.zeros_(damaged.model.vision.head.weight)
    damaged.save(tmp_path / "ignores_images")
    assert run_doctor(str(tmp_path / "ignores_images"), observation=file, device="cpu") == 1
    assert f"ignores the camera {BASE}" in " ".join(capsys.readouterr().out.split())


def test_policy_with_little_metadata_is_printed(capsys, tmp_path, make_policy):
    robot = Embodiment.generic("hand", cameras={BASE: "top"}, state=["x"], actions=["x"])
    config = small_config(
        pi05=False,
        action_horizon=None,
        max_token_len=None,
        paligemma_variant=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
    )
    policy = make_policy(config, robot, norm_stats={"state": stats(1), "actions": stats(1)}, kind="z_score")
    policy.provenance["results"] = "lost"
    policy.save(tmp_path / "policy")
    assert run_doctor(str(tmp_path / "policy"), device="cpu") == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "any number of tokens",
        "horizon not stated",
        "control rate not stated",
        "read as token of the suffix",
    ):
        assert text in out


def test_missing_input_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        run_doctor("demo", observation=tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        run_doctor(str(tmp_path / "none"))
