"""Options of a run: initial weights, trained parameters, statistics, loss, optimizer and mixtures."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from train_helpers import SIZES, assert_same_bits, small_recipe, weights, write_dataset

import torchpi
from torchpi.checkpoints.adapter import Adapter, Base, write_adapter
from torchpi.checkpoints.safetensors_files import SafetensorsArrays
from torchpi.cli import main
from torchpi.convert import convert
from torchpi.data import LeRobotWriter
from torchpi.model.lora import LoraConfig, attach_lora, merge_lora, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.robots import Embodiment, get_embodiment
from torchpi.training import activation_checkpointing, loop, state
from torchpi.training.config import Augmentation, Source, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.run_folder import resume_config
from torchpi.training.samples import Frames, SampleRng, Samples, example_batch, loss_sum, num_loss_elements
from torchpi.training.setup import build_policies, check_prompts, open_data
from torchpi.training.weights import build_model, model_config, open_init, parameter_table, without_gradient
from torchpi.transforms import Normalization, NormStats, load_norm_stats


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def recipe(dataset):
    return small_recipe(dataset, num_steps=3, warmup_steps=1, eval_every=100, save_every=100, log_every=1)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A trained policy to start from."""
    return str(loop.train(recipe, tmp_path_factory.mktemp("runs") / "run").policy)


@pytest.fixture(scope="module")
def further(recipe, trained):
    """A recipe that starts from `trained`."""
    return recipe.replace(init=trained, model=None, frozen_dtype="float32")


def begin(config: TrainConfig):
    init = open_init(config)
    sizes = model_config(config, init)
    return build_model(config, sizes, init, skeleton=False), open_data(config, sizes, init)


# ---- initial weights and data ----


def test_run_starts_from_the_weights_of_init(further, trained):
    (model, report), _ = begin(further)
    initial = torchpi.load_model(trained)
    assert all(torch.equal(p, initial.get_parameter(name)) for name, p in model.named_parameters())
    assert set(report.loaded) == {name for name, _ in initial.named_parameters()}
    assert report.fresh == ()


def test_init_of_other_sizes_raises_error_without_adapt(further, tmp_path):
    sizes = tmp_path / "wider.json"
    sizes.write_text(json.dumps({**SIZES.to_dict(), "action_dim": 8}))
    other = further.replace(model=str(sizes))
    with pytest.raises(ValueError, match=r"action_out_proj\.bias is \[6\], expected \[8\]"):
        begin(other)
    (model, report), _ = begin(other.replace(adapt=True))
    assert model.config.action_dim == 8
    assert "suffix.action_in_proj.weight" in report.adapted
    assert "actions from 6 on, counted from 0, are noise until they are trained" in report.adapted
    assert model.trained_action_dim == 6


def test_lora_policy_trained_from_adapted_weights_loads(further, tmp_path):
    sizes = tmp_path / "wider.json"
    sizes.write_text(json.dumps({**SIZES.to_dict(), "action_dim": 8}))
    config = further.replace(model=str(sizes), adapt=True, finetune="lora", ema_decay=0.0, num_steps=1)
    policy = torchpi.load_policy(loop.train(config, tmp_path / "run").policy)
    assert policy.model.trained_action_dim == 6  # the robot has four actions
    policy.infer(policy.example_observation())


def test_training_marks_the_robots_actions_as_trained(recipe):
    (model, _), data = begin(recipe)
    model.trained_action_dim = 1
    (policy,) = build_policies(recipe, model, data)
    assert model.trained_action_dim == policy.embodiment.action_size
    assert policy.transforms.untrained_actions == ()


def test_norm_stats_option_selects_the_statistics(further, dataset, trained, tmp_path):
    own = json.loads((pathlib.Path(trained) / "norm_stats.json").read_text())
    shifted = tmp_path / "norm_stats.json"
    for key in ("state", "actions"):
        own["norm_stats"][key]["q01"] = [value - 5 for value in own["norm_stats"][key]["q01"]]
    shifted.write_text(json.dumps(own))
    init, q01 = open_init(further), {}
    for norm_stats in ("dataset", "init", str(shifted)):
        q01[norm_stats] = open_data(further.replace(norm_stats=norm_stats), SIZES, init)[0].norm_stats["state"].q01
    np.testing.assert_allclose(q01[str(shifted)], q01["init"] - 5)
    np.testing.assert_allclose(q01["dataset"], q01["init"])  # computed from the same episodes
    with pytest.raises(ValueError, match="has statistics of its own"):
        open_data(further.replace(norm_stats="init:trossen"), SIZES, init)
    with pytest.raises(ValueError, match="needs initial weights: set init"):
        open_data(further.replace(init=None, norm_stats="init"), SIZES)


def test_norm_stats_of_an_openpi_checkpoint_are_selected_by_asset_id(recipe, golden_pi05):
    config = recipe.replace(
        init=str(golden_pi05.root / "jax_ckpt"), model=str(golden_pi05.config), norm_stats="init:nobody"
    )
    with pytest.raises(ValueError, match=r"has statistics for .*; choose one as init:ASSET_ID"):
        open_data(config, SIZES, open_init(config))
    chosen = config.replace(norm_stats="init:tiny_robot")
    expected = load_norm_stats(golden_pi05.root / "jax_ckpt/100/assets/tiny_robot")
    found = open_data(chosen, SIZES, open_init(chosen))[0].norm_stats
    np.testing.assert_array_equal(found["state"].q01, expected["state"].q01)


def test_too_long_prompt_raises_error_before_the_first_step(recipe, tmp_path):
    sizes = tmp_path / "short.json"
    sizes.write_text(json.dumps({**SIZES.to_dict(), "max_token_len": 17}))
    run = tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"prompts longer than the model's max_token_len 17; the longest has 18 tokens"
    ):
        loop.train(recipe.replace(model=str(sizes)), run)
    assert not run.exists()


def test_longest_prompt_is_computed_from_recorded_states(recipe):
    (model, _), data = begin(recipe)
    (policy,) = build_policies(recipe, model, data)
    longest = check_prompts([policy], data)
    samples = Samples([Frames(data[0].train, data[0].embodiment, policy.transforms)], SampleRng(0, 1))
    found = [len(samples[0, frame, 0, 0]["tokenized_prompt"]) for frame in range(len(data[0].train))]
    assert max(longest.values()) == max(found)


# ---- trained parameters ----


@pytest.mark.parametrize(
    ("what", "moves"),
    [
        ("full", {"embedding", "vision", "backbone", "expert", "suffix", "action_out_proj"}),
        ("frozen_vision", {"embedding", "backbone", "expert", "suffix", "action_out_proj"}),
        ("expert", {"expert", "suffix", "action_out_proj"}),
    ],
)
def test_only_trained_parameters_change(further, trained, tmp_path, what, moves):
    result = loop.train(further.replace(finetune=what), tmp_path / "run")
    before, after = torchpi.load_model(trained), torchpi.load_model(result.policy)
    changed = {
        name.split(".")[0] for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))
    }
    assert changed == moves


def test_table_counts_trained_and_frozen_parameters(further):
    config = further.replace(finetune="expert", frozen_dtype="bfloat16")
    (model, _), _ = begin(config)
    rows = {row.part: row for row in parameter_table(model, config)}
    assert rows["vision"].trainable == 0
    assert rows["vision"].dtype == "bfloat16"
    assert rows["expert"].frozen == 0
    assert rows["expert"].dtype == "float32"
    assert sum(row.trainable + row.frozen + row.without_gradient for row in rows.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize("pi05", [True, False])
def test_without_gradient_lists_parameters_that_backward_does_not_reach(pi05):
    model = Pi0(dataclasses.replace(SIZES, pi05=pi05), device="meta")
    attach_lora(model, LoraConfig())
    loss_sum(model, example_batch(model.config, ["camera"], 1, 1, torch.device("meta")), "all").backward()
    assert without_gradient(model) == {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.parametrize("what", ["lora", pytest.param("lora_strict", marks=pytest.mark.slow)])
def test_lora_policy_is_an_adapter_and_merges_exactly(further, trained, tmp_path, what):
    config = further.replace(finetune=what, frozen_dtype="bfloat16")
    result = loop.train(config, tmp_path / "run")
    files = {file.name for file in result.policy.iterdir()}
    assert "adapter.safetensors" in files
    assert "model.safetensors" not in files
    policy = torchpi.load_policy(result.policy)
    convert(result.policy, tmp_path / "merged", "torchpi")
    merged = torchpi.load_policy(tmp_path / "merged")
    observation, noise = policy.example_observation(), np.ones((4, 6), np.float32)
    chunks = [p.infer(observation, noise=noise)["actions"] for p in (policy, merged, torchpi.load_policy(trained))]
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert np.abs(chunks[0] - chunks[2]).max() > 1e-4
    # The saved policy samples the same chunk as the run's own model with the EMA weights of the saved state.
    (model, _), _ = begin(config)
    saved = weights(tmp_path / "run")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"ema.{name}" in saved:
                parameter.copy_(saved[f"ema.{name}"])
    inputs = torchpi.collate.collate([policy.prepare(observation)[1]])
    trained_chunk = model.sample_actions(inputs, noise=torch.from_numpy(noise)[None])
    torch.testing.assert_close(trained_chunk, policy.model.sample_actions(inputs, noise=torch.from_numpy(noise)[None]),
                               atol=5e-5, rtol=0)  # fmt: skip


def test_lora_without_init_raises_error():
    with pytest.raises(ValueError, match="needs initial weights: set init"):
        TrainConfig(finetune="lora")


def test_lora_policy_with_missing_base_raises_error(further, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(further.model.init, base)
    result = loop.train(further.replace(init=str(base), finetune="lora_strict"), tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match=r"is a LoRA adapter for .*base"):
        torchpi.load_policy(result.policy)


def test_lora_policy_with_changed_base_raises_error(further, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(further.model.init, base)
    result = loop.train(further.replace(init=str(base), finetune="lora_strict"), tmp_path / "run")
    whole = torchpi.load_policy(result.policy).model
    half = torchpi.load_policy(result.policy, dtype=torch.bfloat16).model  # merged in float32, then converted
    for (name, parameter), rounded in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(parameter.to(torch.bfloat16), rounded), name
    file = base / "model.safetensors"
    (base / "model.safetensors.checksums.json").unlink()  # the file is changed on purpose
    before = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**before, "embedding": before["embedding"] + 0.01}, file)
    with pytest.raises(ValueError, match=r"LoRA adapter for .*base, whose weights have changed since"):
        torchpi.load_policy(result.policy)


def test_resuming_with_changed_frozen_weights_raises_error(further, tmp_path, capsys):
    """Frozen weights are read from `init` again, which may have changed since the run started."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(further.model.init, base)
    (base / "model.safetensors.checksums.json").unlink()  # the file is changed on purpose
    loop.train(further.replace(init=str(base), finetune="lora_strict"), run)
    longer = resume_config(run).replace(num_steps=4)
    file = base / "model.safetensors"
    before = safetensors.torch.load_file(file)
    trained = {name: value + 1 if name.startswith("suffix.") else value for name, value in before.items()}
    safetensors.torch.save_file({**before, "embedding": before["embedding"] + 0.01}, file)
    with pytest.raises(
        ValueError, match=r"frozen weights differ from those that the run started with: .*base gives the SHA-256"
    ):
        loop.train(longer, run, resume=True)
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*base"):
        loop.train(longer, run, resume=True)
    shutil.move(tmp_path / "elsewhere", base)
    safetensors.torch.save_file(trained, file)  # trained weights come from the run's checkpoint, not from init
    capsys.readouterr()
    assert loop.train(longer, run, resume=True).step == 4
    assert f"weights: checkpoint at step 3; frozen weights: {base}" in capsys.readouterr().err.replace("\n", "")


# ---- options ----


def test_gradient_accumulation_equals_one_large_batch(recipe, tmp_path):
    for number in (1, 4):
        loop.train(recipe.replace(grad_accum_steps=number), tmp_path / str(number))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name, value in one.items():
        if not name.startswith("exp_avg_sq"):
            torch.testing.assert_close(value, four[name], atol=1e-4, rtol=1e-3)
    metrics = [json.loads((tmp_path / number / "metrics.jsonl").read_text().splitlines()[0]) for number in "14"]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-5)


def test_real_loss_ignores_padding(recipe):
    (model, _), data = begin(recipe)
    (policy,) = build_policies(recipe, model, data)
    samples = Samples([Frames(data[0].train, data[0].embodiment, policy.transforms)], SampleRng(0, 2))
    batch = samples.finish(
        samples.collate([samples[0, 5, 0, 0], samples[0, 0, 0, 1]]), "cpu"
    )  # frame 5 is the last one of its episode
    assert batch.is_real.sum(dim=(1, 2)).tolist() == [1 * 4, 4 * 4]
    width = batch.actions.shape[-1]
    elements = []  # loss elements, one action dimension at a time
    for dimension in range(width):
        mask = torch.zeros_like(batch.noise, dtype=torch.bool)
        mask[..., dimension] = True
        loss = model(batch.observation, batch.actions, noise=batch.noise, time=batch.time, loss_mask=mask)
        elements.append(loss * width)
    error = torch.stack(elements, dim=-1)
    assert error.shape == (2, 2, 4, 6)
    real = torch.cat([error[0, :, :1, :4].flatten(), error[1, :, :, :4].flatten()])
    found = loss_sum(single_process(model).forward, batch, "real") / num_loss_elements(batch, "real")
    torch.testing.assert_close(found, real.mean())
    torch.testing.assert_close(
        loss_sum(single_process(model).forward, batch, "all") / num_loss_elements(batch, "all"), error.mean()
    )


def test_like_openpi_shares_augmentation_between_cameras_without_saturation(recipe):
    (model, _), data = begin(recipe)
    (policy,) = build_policies(recipe, model, data)
    frames = [Frames(data[0].train, data[0].embodiment, policy.transforms)]
    always = Augmentation(color_probability=1.0)
    own = Samples(frames, SampleRng(0, 1, augmentation=always))[0, 0, 0, 0]["augmentation"]
    theirs = Samples(frames, SampleRng(0, 1, augmentation=dataclasses.replace(always, like_openpi=True)))[0, 0, 0, 0]
    base, wrist = own["base_0_rgb"], own["left_wrist_0_rgb"]
    assert (base != wrist).all()
    assert base[5] != 0
    np.testing.assert_array_equal(theirs["augmentation"]["base_0_rgb"], theirs["augmentation"]["left_wrist_0_rgb"])
    assert theirs["augmentation"]["base_0_rgb"][5] == 0


@pytest.mark.parametrize("checkpointing", [pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_activation_checkpointing_changes_no_bit(recipe, tmp_path, checkpointing):
    loop.train(recipe, tmp_path / "plain")
    loop.train(recipe.replace(activation_checkpointing=checkpointing), tmp_path / "again")
    assert_same_bits(weights(tmp_path / "plain"), weights(tmp_path / "again"))


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile asks every tensor for it
def test_layers_are_compiled_with_activation_checkpointing(kind, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = torch.nn.Linear(4, 4)
    monkeypatch.setattr(activation_checkpointing, "layers", lambda model: [layer])
    x = torch.randn(2, 4, requires_grad=True)
    expected = layer(x)
    activation_checkpointing.checkpoint_activations(Pi0(SIZES, device="meta"), kind)
    layer.compile(backend=backend)
    found = layer(x)
    assert len(graphs) == 1
    assert torch.equal(found, expected)
    found.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 4))


@pytest.mark.slow
def test_adamw8bit_resumes_bit_for_bit(recipe, tmp_path):
    config = recipe.replace(optimizer="adamw8bit", num_steps=4)
    loop.train(config, tmp_path / "whole")
    saved = weights(tmp_path / "whole")
    large = {name: value for name, value in saved.items() if name.startswith("state1.") and value.dtype == torch.uint8}
    assert "state1.embedding" in large
    loop.train(config.replace(num_steps=2, decay_steps=4), tmp_path / "run")
    longer = resume_config(tmp_path / "run").replace(num_steps=4)
    loop.train(longer, tmp_path / "run", resume=True)
    assert_same_bits(weights(tmp_path / "run"), saved)


def test_policy_without_ema_has_the_weights(recipe, tmp_path):
    result = loop.train(recipe.replace(ema_decay=0.0), tmp_path / "run")
    saved, policy = weights(tmp_path / "run"), torchpi.load_model(result.policy)
    assert not any(name.startswith("ema.") for name in saved)
    assert torch.equal(policy.action_out_proj.weight, saved["weights.action_out_proj.weight"])


# ---- several datasets ----


@pytest.fixture(scope="module")
def other_robot(tmp_path_factory):
    """A robot with one camera and five joints, and a dataset of it."""
    root = tmp_path_factory.mktemp("other")
    joints = ["a", "b", "c", "d", "gripper"]
    robot = Embodiment.generic(
        "arm", cameras={"base_0_rgb": "front"}, state=joints, actions=joints, delta=joints[:4], control_hz=10
    )
    (root / "arm.json").write_text(json.dumps(robot.to_dict()))
    rng = np.random.default_rng(1)
    with LeRobotWriter(
        root / "set", fps=10, cameras={"front": (32, 32, 3)}, state_names=joints, action_names=joints
    ) as writer:
        for _ in range(3):
            for _ in range(5):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                state_, action = rng.normal(size=5), rng.normal(size=5)
                writer.add_frame({"observation.images.front": image, "observation.state": state_, "action": action})
            writer.save_episode("wave")
    return root


@pytest.mark.slow
def test_mixture_trains_robots_of_different_shapes(recipe, dataset, other_robot, tmp_path):
    sources = (
        Source(str(dataset), "metaworld", weight=3.0),
        Source(str(other_robot / "set"), str(other_robot / "arm.json"), weight=1.0, episodes="0:2"),
    )
    config = recipe.replace(dataset="", embodiment="", mixture=sources, chunk_samples=2, holdout=0.2)
    result = loop.train(config, tmp_path / "run")
    robot = result.policy / "robots" / "arm"
    first = torchpi.load_policy(result.policy)
    second = torchpi.load_policy(
        result.policy, embodiment=robot / "embodiment.json", norm_stats=robot / "norm_stats.json"
    )
    assert first.infer(first.example_observation())["actions"].shape == (4, 4)
    assert second.infer(second.example_observation())["actions"].shape == (4, 5)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"chunk_error", "chunk_error_arm", "holdout_loss"} <= set(last)


@pytest.mark.slow
def test_datasets_of_one_robot_keep_separate_statistics(recipe, dataset, other_robot, tmp_path, capsys):
    """The policy folder has statistics per dataset, resuming compares them, and a note is printed."""
    copy = tmp_path / "copy"
    shutil.copytree(other_robot / "set", copy)
    sources = (
        Source(str(dataset), "metaworld"),
        Source(str(other_robot / "set"), str(other_robot / "arm.json"), episodes="0:2"),
        Source(str(copy), str(other_robot / "arm.json"), episodes="1:3"),
    )
    config = recipe.replace(dataset="", embodiment="", mixture=sources, chunk_samples=2, holdout=0.2, num_steps=2)
    run = tmp_path / "run"
    robots = loop.train(config, run).policy / "robots"
    assert {path.name for path in robots.iterdir()} == {"arm", "arm_2"}
    assert " ".join(capsys.readouterr().err.split()).count("have the same state and actions") == 1
    assert (robots / "arm/norm_stats.json").read_text() != (robots / "arm_2/norm_stats.json").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"chunk_error", "chunk_error_arm", "chunk_error_arm_2"} <= set(last)
    document = json.loads((robots / "arm_2/norm_stats.json").read_text())
    document["norm_stats"]["state"]["q99"][0] += 1
    (robots / "arm_2/norm_stats.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"copy: the dataset has changed since .* its statistics of state"):
        loop.train(resume_config(run).replace(num_steps=4), run, resume=True)


def test_camera_that_a_robot_lacks_is_masked(recipe, dataset, other_robot):
    sources = (Source(str(dataset), "metaworld"), Source(str(other_robot / "set"), str(other_robot / "arm.json")))
    config = recipe.replace(dataset="", embodiment="", mixture=sources)
    (model, _), data = begin(config)
    policies = build_policies(config, model, data)
    frames = [Frames(d.train, d.embodiment, p.transforms) for d, p in zip(data, policies, strict=True)]
    samples = Samples(frames, SampleRng(0, 1, augmentation=Augmentation()))
    batch = samples.finish(samples.collate([samples[0, 0, 0, 0], samples[1, 0, 0, 1]]), "cpu")
    assert {name: mask.tolist() for name, mask in batch.observation.image_masks.items()} == {
        "base_0_rgb": [True, True], "left_wrist_0_rgb": [True, False],
    }  # fmt: skip
    assert batch.is_real[:, 0].sum(dim=-1).tolist() == [4, 5]


def test_mixture_survives_json_round_trip(recipe, tmp_path):
    config = recipe.replace(dataset="", embodiment="", mixture=(Source("a", "aloha", 2.0), Source("b", "droid")))
    (tmp_path / "recipe.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "recipe.json") == config


def test_train_command_reads_a_mixture_recipe(recipe, tmp_path, capsys):
    sources = (Source("a", "aloha", 2.0), Source("b", "metaworld", fps=10.0), Source("c", "metaworld"))
    file = tmp_path / "recipe.json"
    file.write_text(recipe.replace(dataset="", embodiment="", mixture=sources).to_json())
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(file), "--out", str(tmp_path / "run")])
    assert "no folder a;" in capsys.readouterr().err


def test_only_selected_episodes_are_trained_on(recipe):
    config = recipe.replace(episodes="0:3", holdout=0.0)
    (data,) = open_data(config, SIZES)
    assert data.train.episode_indices == (0, 1, 2)
    assert data.holdout is None


def test_skip_idle_drops_frames_without_motion(recipe, tmp_path):
    path = tmp_path / "set"
    with LeRobotWriter(
        path, fps=10, cameras={"base": (32, 32, 3), "wrist": (32, 32, 3)}, state_names=list("abcd"),
        action_names=list("abcd"),
    ) as writer:  # fmt: skip
        for episode in range(2):
            for frame in range(60):
                black = np.zeros((32, 32, 3), np.uint8)
                value = np.full(4, max(0, frame - 30) * 0.1 + episode * 0.0)  # no motion for three seconds
                images = {"observation.images.base": black, "observation.images.wrist": black}
                writer.add_frame({**images, "observation.state": value, "action": value})
            writer.save_episode("go")
    robot = dataclasses.replace(get_embodiment("metaworld"), control_hz=10).to_dict()
    (tmp_path / "robot.json").write_text(json.dumps(robot))
    config = recipe.replace(dataset=str(path), embodiment=str(tmp_path / "robot.json"), holdout=0.0)
    (everything,) = open_data(config, SIZES)
    (moving,) = open_data(config.replace(skip_idle=True), SIZES)
    assert len(everything.frames) == 120
    assert 60 <= len(moving.frames) <= 84
    assert not set(range(15)) & set(moving.frames.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adamw8bit", "parallel": "fsdp"}, "can't be sharded"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be `int` >= 1"),
        (
            {"dataset": "a", "mixture": (Source("b", "aloha"),)},
            "mixture of datasets can't also set dataset; set them in the mixture's entries",
        ),
        ({"timescale": 0.0}, "timescale must be `float` > 0"),
        ({"keep_every": 0}, "keep_every must be"),
    ],
)
def test_invalid_recipe_raises_error(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_dataset_smaller_than_a_batch_raises_error(recipe):
    with pytest.raises(ValueError, match="18 frames to train on, fewer than a batch of 64"):
        open_data(recipe.replace(batch_size=64), SIZES)


def test_too_old_pytorch_raises_error_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter", lambda save_sharded: None)  # 2.8
    with pytest.raises(ValueError, match=r"pip install 'torch>=2\.9'"):
        loop.train(recipe, tmp_path / "run")
    monkeypatch.delattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter")  # 2.6
    with pytest.raises(ValueError, match=r"pip install 'torch>=2\.9'"):
        loop.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_optimizers_checkpoint_raises_error(recipe, tmp_path):
    loop.train(recipe, tmp_path / "run")
    (model, _), _ = begin(recipe)
    other = state.TrainState.create(model, weight_decay=0.0, ema=False)
    with pytest.raises(ValueError, match="belongs to another model, recipe or optimizer"):
        other.load(state.checkpoints(tmp_path / "run")[-1] / state.STATE, 3)


def test_action_prefix_is_drawn_and_masked_in_the_loss(recipe, tmp_path):
    config = recipe.replace(max_action_prefix=2)
    (model, _), data = begin(config)
    (policy,) = build_policies(config, model, data)
    samples = Samples(
        [Frames(data[0].train, data[0].embodiment, policy.transforms)], SampleRng(0, 8, max_action_prefix=2)
    )
    batch = samples.finish(samples.collate([samples[0, i, 0, i] for i in range(4)]), "cpu")
    assert set(batch.prefix_len.flatten().tolist()) == {0, 1, 2}
    elements = batch.loss_mask("all")
    assert elements.sum(dim=(2, 3)).tolist() == ((4 - batch.prefix_len) * 6).tolist()
    assert num_loss_elements(batch, "all") == int(elements.sum())
    result = loop.train(config, tmp_path / "run")
    assert torchpi.load_policy(result.policy).metadata["max_action_prefix"] == 2


def test_frozen_weights_are_read_in_frozen_dtype(further, monkeypatch):
    config = further.replace(finetune="lora", lora=LoraConfig(backbone_rank=2, expert_rank=2), frozen_dtype="bfloat16")
    init, read = open_init(config), dict[str, torch.dtype]()

    def record(arrays, name, dtype=None, original=SafetensorsArrays.read):
        read[name] = dtype
        return original(arrays, name, dtype)

    monkeypatch.setattr(SafetensorsArrays, "read", record)
    built, _ = build_model(config, init.config, init, skeleton=False)
    whole = init.model()
    trained = trainable_parameters(built, "lora")
    assert not all(trained.values())
    for name, parameter in whole.named_parameters():
        dtype = torch.float32 if trained[name] else torch.bfloat16
        assert torch.equal(built.get_parameter(name), parameter.to(dtype)), name
    read.clear()
    build_model(config, init.config, init, skeleton=False)
    assert {name: dtype for name, dtype in read.items() if not trained[name]} == dict.fromkeys(
        [name for name, _ in whole.named_parameters() if not trained[name]], torch.bfloat16
    )


def test_file_truncated_after_opening_raises_error(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "policy")
    init = open_init(TrainConfig(init=str(tmp_path / "policy"), dtype="float32"))
    file = tmp_path / "policy" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors had \d+ bytes when it was opened, and has \d+ now"):
        init.model()


def test_lora_of_openpi_checkpoints_is_trained_further(golden_root, tmp_path):
    """The checkpoint determines ranks and layers; the trained matrices are saved with the same base."""
    lora = LoraConfig(backbone_rank=4, backbone_alpha=8.0, expert_rank=6, expert_alpha=3.0)
    root = golden_root / "lora" / "pi05"
    config = TrainConfig(
        init=str(root / "jax_ckpt"), model=str(root / "model_config.json"), finetune="lora", lora=lora, dtype="float32",
        frozen_dtype="float32",
    )  # fmt: skip
    init = open_init(config)
    model, report = build_model(config, init.config, init, skeleton=False)
    assert report.fresh == ()
    assert any(name.endswith("lora_a") for name in report.loaded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_a", "lora_b")):
                parameter += 0.01
    robot = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=["a", "b"], actions=["a", "b"])
    stats = dict.fromkeys(("state", "actions"), NormStats(*(np.full(2, value) for value in (0.0, 1.0, -1.0, 1.0))))
    policy = torchpi.Policy(
        model, robot, norm_stats=stats, tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
        normalization=dict.fromkeys(("state", "actions"), Normalization("quantile", "openpi")),
    )  # fmt: skip
    (tmp_path / "policy").mkdir()
    policy.write_spec(tmp_path / "policy")
    trained = [n for n, is_trained in trainable_parameters(model, "lora").items() if is_trained and "lora_" not in n]
    adapter = Adapter(lora, tuple(trained), Base(config.model.init, "float32"))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_" in n or n in trained}
    write_adapter(tmp_path / "policy", adapter, shapes, model.get_parameter)
    again = torchpi.load_policy(tmp_path / "policy")
    observation, noise = policy.example_observation(), np.ones((50, 32), np.float32)
    chunks = [p.infer(observation, noise=noise)["actions"] for p in (policy, again)]
    np.testing.assert_allclose(chunks[0], chunks[1], atol=5e-5)
    with pytest.raises(ValueError, match="use the same, or fold it"):
        build_model(config.replace(lora=LoraConfig(), lora_alpha=(8.0, 3.0)), init.config, init, skeleton=False)


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_missing_alphas_of_initial_lora_raise_error(finetune, golden_root):
    """The error comes when the headers are read, so for a plan as well as for a run."""
    root = golden_root / "lora" / "pi05"
    ranks = LoraConfig(backbone_rank=4, expert_rank=6)
    config = TrainConfig(init=str(root / "jax_ckpt"), model=str(root / "model_config.json"), finetune=finetune)
    with pytest.raises(ValueError, match=r"rank 4 in the backbone .*Pass lora_alpha=") as caught:
        open_init(config.replace(lora=ranks))
    assert not getattr(caught.value, "__notes__", [])  # no hint at --adapt, which would not help
    expected = torchpi.load_model(root / "jax_ckpt", config=root / "model_config.json", lora_alpha=(8.0, 3.0))
    before = dataclasses.replace(ranks, backbone_alpha=8.0, expert_alpha=3.0)  # recipes older than lora_alpha
    for stated in (config.replace(lora_alpha=(8.0, 3.0), lora=before), config.replace(lora=before)):
        stated = stated.replace(dtype="float32", frozen_dtype="float32")
        init = open_init(stated)
        model, _ = build_model(stated, init.config, init, skeleton=False)
        if finetune == "lora":
            merge_lora(model)
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=1e-6, rtol=1e-6)


def test_alphas_without_initial_lora_raise_error(recipe, further):
    with pytest.raises(ValueError, match="lora_alpha describes the initial weights"):
        recipe.replace(lora_alpha=(16.0, 32.0))
    with pytest.raises(ValueError, match="lora_alpha= belongs to a checkpoint with LoRA"):
        open_init(further.replace(lora_alpha=(16.0, 32.0)))


def test_initial_policy_without_tokenizer_raises_error(further, trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "policy")
    (root / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    config = further.replace(init=str(root))
    (model, _), data = begin(config)
    with pytest.raises(FileNotFoundError, match=r"policy has no tokenizer\.model or tokenizer\.json"):
        build_policies(config, model, data, open_init(config))
    build_policies(config.replace(tokenizer=str(tmp_path / "elsewhere.model")), model, data, open_init(config))


def test_images_and_prompt_follow_the_initial_policy(further, trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "policy")
    document = json.loads((root / "policy.json").read_text())
    document["image_transform"].update(filter="bilinear", bars=-3)
    document["prompt"]["state_dim"] = 6
    (root / "policy.json").write_text(json.dumps(document))
    config = further.replace(init=str(root))
    (model, _), data = begin(config)
    (policy,) = build_policies(config, model, data, open_init(config))
    samples = Samples(
        [Frames(data[0].train, data[0].embodiment, policy.transforms)], SampleRng(seed=0, flow_samples_per_obs=1)
    )
    sample = samples[0, 0, 0, 0]
    assert {image.dtype for image in sample["image"].values()} == {np.dtype(np.float32)}
    assert len(policy.transforms.prompt_text("go", np.zeros(4)).split("State: ")[1].split(";")[0].split()) == 6
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/policy.json").read_text())["image_transform"] == document["image_transform"]
    (other,) = build_policies(config.replace(preprocessing="openpi"), model, data, open_init(config))
    assert (other.transforms.image_transform.filter, other.transforms.prompt_state_dim) == (
        "bilinear_antialiased",
        None,
    )


def test_prompt_option_replaces_the_tasks_of_all_episodes(recipe, tmp_path):
    """It is also the default prompt of the saved policy."""
    config = recipe.replace(prompt="transfer the cube")
    (model, _), data = begin(config)
    (policy,) = build_policies(config, model, data)
    assert list(check_prompts([policy], data)) == ["transfer the cube"]
    result = loop.train(config, tmp_path / "run")
    assert torchpi.load_policy(result.policy).default_prompt == "transfer the cube"


def test_rename_maps_columns_to_the_robots_names(recipe, tmp_path):
    """For example in openpi's own datasets."""
    path = tmp_path / "set"
    write_dataset(path, cameras=("top", "wrist"))
    with pytest.raises(KeyError, match="--rename"):
        open_data(recipe.replace(dataset=str(path)), SIZES)
    config = recipe.replace(dataset=str(path), rename=("observation.images.top=observation.images.base",))
    (tmp_path / "recipe.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "recipe.json") == config
    (data,) = open_data(config, SIZES)
    assert data.train.camera_keys == ("observation.images.base", "observation.images.wrist")


def test_held_out_chunks_are_sampled_with_the_training_prompt(recipe, tmp_path, monkeypatch):
    from torchpi.transforms import pipeline

    prompts: list[str] = []
    tokenize = pipeline.tokenize_prompt
    monkeypatch.setattr(
        pipeline,
        "tokenize_prompt",
        lambda tokenizer, text, *a, **k: prompts.append(text) or tokenize(tokenizer, text, *a, **k),
    )
    config = recipe.replace(prompt="transfer the cube", num_steps=1, chunk_samples=2)
    loop.train(config, tmp_path / "run")
    assert set(prompts) == {"transfer the cube"}
