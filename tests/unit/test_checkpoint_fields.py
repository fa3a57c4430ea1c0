"""Fields and steps in a policy's config files: used, without effect, or refused by name."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import torchpi
from torchpi.checkpoints import folder
from torchpi.checkpoints import lerobot as lerobot_files
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.fields import FIELDS, require_fields
from torchpi.checkpoints.sizes import add_stated
from torchpi.checkpoints.spec import MAX_ACTION_PREFIX
from torchpi.policy import policy_of
from torchpi.robots import StateKey

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"

# Fields of π₀'s and π₀.₅'s configs in LeRobot 0.4.0; all later versions have them, too.
LEROBOT_04 = """n_obs_steps input_features output_features device use_amp push_to_hub repo_id private tags license
    pretrained_path paligemma_variant action_expert_variant dtype chunk_size n_action_steps max_state_dim max_action_dim
    num_inference_steps time_sampling_beta_alpha time_sampling_beta_beta time_sampling_scale time_sampling_offset
    min_period max_period image_resolution empty_cameras tokenizer_max_length normalization_mapping
    gradient_checkpointing compile_model compile_mode optimizer_lr optimizer_betas optimizer_eps
    optimizer_weight_decay optimizer_grad_clip_norm scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr"""
LATER = """use_peft rtc_config freeze_vision_encoder train_expert_only use_relative_actions relative_exclude_joints
    action_feature_names pretrained_revision rtc_training_max_delay"""


class Folder:
    """A copy of golden's LeRobot policy for tests that change it."""

    def __init__(self, golden, root):
        self.golden = golden
        self.root = shutil.copytree(golden.root / "lerobot", root)

    def edit(self, name, change):
        document = json.loads((self.root / name).read_text())
        change(document)
        (self.root / name).write_text(json.dumps(document))

    def configure(self, **fields):
        self.edit("config.json", lambda document: document.update(fields))

    def set(self, file, name, **settings):
        self.edit(file, lambda document: step(document, name)["config"].update(settings))

    def change_statistics(self, change, pattern="*.safetensors"):
        for file in self.root.glob(f"policy_{pattern}"):
            arrays = safetensors.numpy.load_file(file)
            safetensors.numpy.save_file(change(arrays), file)

    def forget_statistics(self):
        for name in (BEFORE, AFTER):
            self.edit(name, lambda document: [entry.pop("state_file", None) for entry in document["steps"]])

    def spec(self):
        return open_checkpoint(self.root, config=self.golden.config).spec()


def step(document, name):
    return next(step for step in document["steps"] if step["registry_name"] == name)


@pytest.fixture
def lerobot(golden, tmp_path):
    return Folder(golden, tmp_path / "lerobot")


@pytest.fixture
def pi05(golden_pi05, tmp_path):
    return Folder(golden_pi05, tmp_path / "pi05")


# The tables


def test_docs_list_the_known_fields():
    script = pathlib.Path(__file__).parents[2] / "scripts" / "checkpoint_fields.py"
    spec = importlib.util.spec_from_file_location("checkpoint_fields", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.PAGE.read_text("utf-8").split(module.BEGIN)[1].split(module.END)[0]
    assert written == module.tables(), "run scripts/checkpoint_fields.py"


def test_table_of_policy_json_has_its_fields():
    fields = {field.name for field in dataclasses.fields(folder.PolicyFile)}
    assert set(FIELDS["torchpi: policy.json"]) == fields


def test_table_entries_have_one_of_used_unused_only():
    for fields in FIELDS.values():
        for field in fields.values():
            assert [field.used is not None, field.unused is not None, bool(field.only)].count(True) == 1
            assert bool(field.because) == bool(field.only)


def test_fields_of_lerobot_04_and_later_are_known():
    for name in f"{LEROBOT_04} {LATER}".split():
        only = FIELDS["lerobot: config.json"].get(name)
        require_fields("lerobot: config.json", {name: only.only[0] if only and only.only else None}, "config.json")


# config.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_obs_steps": 2}, "n_obs_steps is 2; only 1 is supported"),
        ({"use_visual_memory": True}, "use_visual_memory is true; only false is supported: a memory of frames"),
        ({"use_proprioceptive_memory": True}, "use_proprioceptive_memory is true"),
        ({"min_period": 0.001}, "min_period is 0.001; only 0.004 is supported"),
        ({"max_period": 8.0}, "max_period is 8.0; only 4.0 is supported"),
        ({"state_cond": True}, r"has the unknown field state_cond \(true\), whose effect torchpi does not know"),
        ({"discrete_state_input": False}, r"has the unknown field discrete_state_input \(false\)"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, found 0"),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be at most 1000, found 1000000000"),
        ({"empty_cameras": 10**6}, "empty_cameras must be at most 100, found 1000000"),
        ({"chunk_size": 10**9}, "chunk_size must be at most 4096, found 1000000000"),
        ({"tokenizer_max_length": 10**7}, "tokenizer_max_length must be at most 16384, found 10000000"),
        ({"n_action_steps": 10**7}, "n_action_steps must be at most 4096"),
        ({"rtc_training_max_delay": 10**7}, "rtc_training_max_delay must be at most 4096"),
        ({"image_resolution": [[1], [1]]}, "only square images are supported"),
        ({"num_inference_steps": True}, "num_inference_steps must be a positive integer, found True"),
        ({"rtc_training_max_delay": -1}, "rtc_training_max_delay must be a non-negative integer, found -1"),
        ({"type": "pi0_fast"}, "is a π₀-FAST policy of LeRobot, which is not supported yet"),
        ({"type": "smolvla"}, 'type is "smolvla"; only "pi0" or "pi05" is supported'),
    ],
)
def test_config_of_another_model_is_refused(pi05, fields, message):
    pi05.configure(**fields)
    with pytest.raises(ValueError, match=message):
        pi05.spec()


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        (BEFORE, None, FileNotFoundError, "a LeRobot policy since version 0.4 has it"),
        (NORMALIZER, None, FileNotFoundError, "the policy's statistics are expected there"),
        (NORMALIZER, b"{}", ValueError, "is truncated or corrupt: .*get the file again"),
        (
            NORMALIZER,
            safetensors.numpy.save({"action.mean": np.zeros(7)}),
            ValueError,
            "of action have no q01, q99, std",
        ),
    ],
)
def test_files_of_processors_that_are_missing_or_damaged_are_named(pi05, file, content, error, message):
    (pi05.root / file).unlink()
    if content is not None:
        (pi05.root / file).write_bytes(content)
    with pytest.raises(error, match=message):
        pi05.spec()


def test_lerobot_folder_notes_differences_and_refuses_ambiguous_names(pi05, tmp_path):
    spec, config = pi05.spec(), torchpi.Pi0Config.from_json(pi05.golden.config)
    names = spec.embodiment.state_names
    parts = (StateKey("arm", names[:2]), StateKey("hand", names[2:]))
    robot = dataclasses.replace(spec.embodiment, state=parts)
    spec = dataclasses.replace(spec, embodiment=robot, metadata={MAX_ACTION_PREFIX: 3})
    notes = " ".join(lerobot_files.write_spec(tmp_path, config, spec, "float32"))
    assert "LeRobot's state is one vector: send arm, hand concatenated" in notes
    assert "rtc_training_max_delay is written, which only LeRobot after version 0.6.1 can read" in notes
    first, second, *rest = robot.actions
    alike = (
        dataclasses.replace(first, name="grip_turn", kind="delta"),
        dataclasses.replace(second, name="grip", kind="absolute"),
    )
    spec = dataclasses.replace(spec, embodiment=dataclasses.replace(robot, actions=(*alike, *rest)))
    with pytest.raises(ValueError, match=r"parts of their names, and grip_turn contains one of .*grip"):
        lerobot_files.write_spec(tmp_path, config, spec, "float32")


def test_sizes_that_contradict_the_arrays_are_an_error(tmp_path):
    arrays, stated = torchpi.Pi0Config(action_horizon=None), {"action_dim": 64, "action_horizon": 10}
    with pytest.raises(ValueError, match=r"contradicts the arrays: action_dim is 64 there, 32 in the arrays\. Correct"):
        add_stated(arrays, stated, tmp_path, may_contradict=False)
    config, (overruled,) = add_stated(arrays, stated, tmp_path, may_contradict=True)
    assert (config.action_dim, config.action_horizon) == (32, 10)
    assert overruled.endswith("action_dim is 64 there, 32 in the arrays")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", "a\nb"])
def test_invalid_file_names_are_refused(pi05, name):
    pi05.edit(BEFORE, lambda document: step(document, "normalizer_processor").update(state_file=name))
    with pytest.raises(ValueError, match=r"a processor names the file .*; only files next to it are read"):
        pi05.spec()
    pi05.forget_statistics()
    pi05.edit(BEFORE, lambda document: step(document, "tokenizer_processor").pop("artifacts", None))
    pi05.set(BEFORE, "tokenizer_processor", tokenizer_name=name)
    with pytest.raises(ValueError, match=r"tokenizer_name .* can't be the name of a folder"):
        pi05.spec()


def test_num_inference_steps_is_read(lerobot, tmp_path):
    lerobot.configure(num_inference_steps=4)
    policy = torchpi.load_policy(lerobot.root, config=lerobot.golden.config)
    assert (policy.num_steps, policy.metadata["num_steps"]) == (4, 4)
    observation, noise = policy.example_observation(), np.zeros(policy.model.config.chunk_shape, np.float32)
    four, ten = (policy.infer(observation, noise=noise, num_steps=n)["actions"] for n in (4, 10))
    np.testing.assert_array_equal(policy.infer(observation, noise=noise)["actions"], four)
    assert not np.array_equal(four, ten)
    (tmp_path / "saved").mkdir()
    policy.write_spec(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/policy.json").read_text())["num_steps"] == 4
    assert folder.read_policy_file(tmp_path / "saved")[0].num_steps == 4
    policy.num_steps = 10
    policy.write_spec(tmp_path / "saved")
    assert "num_steps" not in json.loads((tmp_path / "saved/policy.json").read_text())


@pytest.mark.parametrize("found", [0, -3, 2.5, "10", 10**9])
def test_policy_file_with_invalid_num_steps_is_refused(found, tmp_path):
    demo = pathlib.Path(torchpi.__file__).parent / "assets/demo_policy/policy.json"
    (tmp_path / "policy.json").write_text(json.dumps({**json.loads(demo.read_text()), "num_steps": found}))
    with pytest.raises(ValueError, match="num_steps"):
        folder.read_policy_file(tmp_path)


def test_max_action_prefix_is_read_from_rtc_training_max_delay(lerobot):
    assert MAX_ACTION_PREFIX not in lerobot.spec().metadata
    lerobot.configure(rtc_training_max_delay=5)
    assert lerobot.spec().metadata[MAX_ACTION_PREFIX] == 5


def test_empty_cameras_without_features_are_added_last(lerobot):
    lerobot.configure(empty_cameras=2)
    lerobot.edit("config.json", lambda d: d["input_features"].pop("observation.images.right_wrist_0_rgb"))
    cameras = [(camera.name, camera.presence) for camera in lerobot.spec().embodiment.cameras]
    assert cameras == [
        *(("base_0_rgb", "optional"), ("left_wrist_0_rgb", "optional")),
        *((f"empty_camera_{i}", "masked") for i in range(2)),
    ]


@pytest.mark.parametrize("dim", [3, 6])
def test_state_dim_follows_the_statistics(lerobot, dim):
    lerobot.change_statistics(lambda a: {k: v[:dim] if k.startswith("observation.state.") else v for k, v in a.items()})
    assert len(lerobot.spec().embodiment.state_names) == dim


def test_action_dim_follows_the_statistics_not_the_bases_features(pi05):
    pi05.change_statistics(lambda a: {k: v[:6] if k.startswith("action.") else v for k, v in a.items()})
    assert pi05.spec().embodiment.action_size == 6


# Steps


def reorder(document, name, place):
    document["steps"].insert(place, document["steps"].pop(document["steps"].index(step(document, name))))


def drop(document, name):
    document["steps"].remove(step(document, name))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (BEFORE, lambda d: drop(d, "normalizer_processor"), "lacks the steps normalizer_processor"),
        (BEFORE, lambda d: drop(d, "tokenizer_processor"), "lacks the steps tokenizer_processor"),
        (BEFORE, lambda d: drop(d, "pi05_prepare_state_tokenizer_processor_step"), "lacks the steps pi05_prepare"),
        (AFTER, lambda d: drop(d, "unnormalizer_processor"), "lacks the steps unnormalizer_processor"),
        (BEFORE, lambda d: d["steps"].append(step(d, "normalizer_processor")), "normalizer_processor twice"),
        (BEFORE, lambda d: d["steps"].append(step(d, "device_processor")), "device_processor twice"),
        (AFTER, lambda d: d["steps"].append(step(d, "unnormalizer_processor")), "unnormalizer_processor twice"),
        (BEFORE, lambda d: reorder(d, "normalizer_processor", 6), "in the order .*tokenizer_processor, normalizer"),
        (BEFORE, lambda d: reorder(d, "relative_actions_processor", 3), "in the order .*normalizer_processor, rel"),
        (BEFORE, lambda d: reorder(d, "rename_observations_processor", 5), "in the order"),
        (AFTER, lambda d: reorder(d, "absolute_actions_processor", 0), "expected unnormalizer_processor, absolute"),
        (BEFORE, lambda d: d["steps"].append({"registry_name": "pi0_new_line_processor"}), "unknown steps: pi0_new"),
        (BEFORE, lambda d: d["steps"].append({"class": "my.Step", "config": {}}), r"unknown fields steps.7.class"),
        (BEFORE, lambda d: d.update(sampling={}), "unknown fields sampling"),
        (BEFORE, lambda d: step(d, "normalizer_processor").update(enabled=False), r"unknown fields steps.3.enabled"),
        (BEFORE, lambda d: step(d, "normalizer_processor")["config"].update(clip=5), "has the unknown field clip"),
        (BEFORE, lambda d: step(d, "tokenizer_processor")["config"].update(padding_side="left"), "padding_side is"),
        (BEFORE, lambda d: step(d, "tokenizer_processor")["config"].update(task_key="goal"), "task_key is"),
        (BEFORE, lambda d: step(d, "tokenizer_processor")["config"].update(truncation=False), "truncation is false"),
        (BEFORE, lambda d: step(d, "device_processor")["config"].update(float_dtype="float16"), "float_dtype is"),
        (BEFORE, lambda d: step(d, "rename_observations_processor")["config"].update(scale=2), "unknown field scale"),
        (BEFORE, lambda d: step(d, "normalizer_processor")["config"]["norm_map"].update(VISUAL="MEAN_STD"), "images are normalized by MEAN_STD"),  # noqa: E501
        (AFTER, lambda d: step(d, "unnormalizer_processor")["config"]["norm_map"].update(VISUAL="MIN_MAX"), "images are normalized by MIN_MAX"),  # noqa: E501
        (AFTER, lambda d: step(d, "unnormalizer_processor")["config"]["norm_map"].update(ACTION="MEAN_STD"), "normalize actions by different rules"),  # noqa: E501
        (BEFORE, lambda d: step(d, "relative_actions_processor")["config"].update(enabled=True), "relative actions are on in"),  # noqa: E501
        (AFTER, lambda d: step(d, "absolute_actions_processor")["config"].update(enabled=True), "relative actions are off in"),  # noqa: E501
    ],
)  # fmt: skip
def test_unsupported_steps_are_refused(pi05, file, change, message):
    pi05.edit(file, change)
    with pytest.raises(ValueError, match=message):
        pi05.spec()


def test_relative_actions_without_absolute_step_are_refused(pi05):
    pi05.set(BEFORE, "relative_actions_processor", enabled=True)
    pi05.edit(AFTER, lambda d: drop(d, "absolute_actions_processor"))
    with pytest.raises(
        ValueError, match=r"relative actions are on in .*pre.*, but not in policy_post.*: the robot would"
    ):
        pi05.spec()


def test_neutral_steps_may_be_anywhere_or_missing(lerobot):
    expected = lerobot.spec()
    lerobot.edit(BEFORE, lambda d: (reorder(d, "device_processor", 0), drop(d, "to_batch_processor")))
    lerobot.edit(BEFORE, lambda d: drop(d, "relative_actions_processor"))  # as LeRobot 0.4 writes it
    lerobot.edit(AFTER, lambda d: drop(d, "absolute_actions_processor"))
    found = lerobot.spec()
    assert (found.embodiment, found.normalization) == (expected.embodiment, expected.normalization)


def test_action_statistics_that_differ_before_and_after_the_model_are_refused(lerobot):
    lerobot.change_statistics(lambda a: {**a, "action.q01": a["action.q01"] - 1}, "postprocessor*.safetensors")
    with pytest.raises(ValueError, match="normalize actions by different rules or statistics"):
        lerobot.spec()


def test_action_statistics_in_only_one_processor_are_refused(lerobot):
    others = {"state.q01": np.zeros(1, np.float32)}
    lerobot.change_statistics(lambda a: {k: v for k, v in a.items() if k[:7] != "action."} | others, "pre*.safetensors")
    with pytest.raises(ValueError, match="normalize actions by different rules or statistics"):
        lerobot.spec()


# Statistics


def stats_file(tmp_path, dim):
    one = {"mean": [5.0] * dim, "std": [2.0] * dim, "q01": [1.0] * dim, "q99": [9.0] * dim}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": one, "actions": one}}))
    return tmp_path / "norm_stats.json"


@pytest.mark.parametrize("width", [4, 7])
def test_base_without_statistics_requires_norm_stats(lerobot, tmp_path, width):
    lerobot.forget_statistics()
    kind = "quantile" if lerobot.golden.kind == "pi05" else "z_score"
    spec = lerobot.spec()
    assert (spec.norm_stats, {rule.kind for rule in spec.normalization.values()}) == (None, {kind})
    with pytest.raises(ValueError, match=f"has no statistics, and normalizes state by {kind}.*pass norm_stats="):
        spec.requested()
    given = spec.requested(norm_stats=stats_file(tmp_path, width))
    assert (len(given.embodiment.state_names), given.embodiment.action_size) == (width, width)
    policy = policy_of(torchpi.Pi0(open_checkpoint(lerobot.root, config=lerobot.golden.config).config), given)
    observation = policy.example_observation()
    observation["observation"]["state"] = np.full(width, 9.0, np.float32)
    expected = 1.0 if kind == "quantile" else 2.0
    np.testing.assert_allclose(policy.prepare(observation)[1]["state"][:width], expected, rtol=1e-6)


def test_base_with_min_max_warns_that_it_uses_quantiles(pi05, tmp_path):
    for file, name in ((BEFORE, "normalizer_processor"), (AFTER, "unnormalizer_processor")):
        pi05.edit(file, lambda d, n=name: step(d, n)["config"]["norm_map"].update(STATE="MIN_MAX", ACTION="MIN_MAX"))
    pi05.forget_statistics()
    with pytest.warns(UserWarning, match="normalizes by MIN_MAX, and has no statistics: q01 and q99 of the given stat"):
        assert pi05.spec().normalization["state"].kind == "quantile"


@pytest.mark.parametrize(
    ("feature", "key", "other"), [("observation.state.", "state", "actions"), ("action.", "actions", "state")]
)
def test_missing_statistics_of_state_or_actions_warn(lerobot, feature, key, other):
    lerobot.change_statistics(lambda a: {k: v for k, v in a.items() if not k.startswith(feature)} or {"x": np.zeros(1)})
    with pytest.warns(UserWarning, match=f"has no statistics of {key}, which is therefore not normalized"):
        spec = lerobot.spec()
    assert spec.normalization[key].kind == "identity"
    assert spec.normalization[other].kind != "identity"


def test_identity_needs_no_statistics(lerobot):
    for file, name in ((BEFORE, "normalizer_processor"), (AFTER, "unnormalizer_processor")):
        lerobot.edit(
            file, lambda d, n=name: step(d, n)["config"]["norm_map"].update(STATE="IDENTITY", ACTION="IDENTITY")
        )
    lerobot.forget_statistics()
    spec = lerobot.spec().requested()
    assert {rule.kind for rule in spec.normalization.values()} == {"identity"}


def test_stats_compare_with_base_without_statistics_is_an_error(lerobot):
    from torchpi.cli.stats import checkpoint_stats

    lerobot.forget_statistics()
    with pytest.raises(ValueError, match="has no statistics, and normalizes"):
        checkpoint_stats(lerobot.root)


@pytest.mark.parametrize("kind", ["act", "pi0_fast", None])
def test_stats_compare_names_policies_of_another_type(pi05, kind):
    from torchpi.cli.stats import checkpoint_stats

    pi05.configure(type=kind)
    with pytest.raises(ValueError, match=f"type is {kind!r}; expected pi0 or pi05"):
        checkpoint_stats(pi05.root)


# openpi's config.json


@pytest.fixture
def port(golden_pi05, tmp_path):
    """Open openpi's PyTorch checkpoint with other fields in its config.json, and stated numbers of heads."""
    root = shutil.copytree(golden_pi05.root / "openpi_pytorch", tmp_path / "port")
    sizes = json.loads(golden_pi05.config.read_text())
    heads = {part: {k: v for k, v in sizes[part].items() if "heads" in k} for part in ("siglip", "paligemma")}
    (tmp_path / "heads.json").write_text(json.dumps(heads | {"action_expert": heads["paligemma"]}))

    def opened(fields):
        document = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(document | fields))
        return open_checkpoint(root, config=tmp_path / "heads.json")

    return opened


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pi05": "yes"}, "pi05 must be true or false, found 'yes'"),
        ({"max_token_len": 0}, "max_token_len must be a positive integer, found 0"),
        ({"use_memory": True}, "has the unknown field use_memory"),
        ({"model_type": "paligemma"}, r"is a paligemma model of transformers.*npz"),
    ],
)
def test_openpi_config_with_unknown_fields_is_refused(port, fields, message):
    with pytest.raises(ValueError, match=message):
        port(fields)


def test_openpi_config_may_state_variant_prompt_and_length(port):
    checkpoint = port({"max_token_len": 180, "discrete_state_input": False, "pi05": False, "dtype": "bfloat16"})
    assert (checkpoint.config.max_token_len, checkpoint.config.discrete_state_input) == (180, False)
    assert "pi05 is False there, True in the arrays" in checkpoint.notes[0]
