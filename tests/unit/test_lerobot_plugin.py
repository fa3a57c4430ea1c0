"""The policies for LeRobot, with a stand-in for LeRobot: batches, chunks, training, saving, and a server.

Tests with LeRobot itself are in integrations/lerobot/tests.
"""

import importlib
import importlib.metadata
import json
import sys
import types

import lerobot_stand_in
import numpy as np
import pytest
import torch
from lerobot_stand_in import Feature, NormalizationMode, RTCConfig

import torchpi
from torchpi.checkpoints.formats import format_of
from torchpi.data import LeRobotDataset, LeRobotWriter, compute_norm_stats
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server

CHUNK, WIDTH = 16, 8
STATE, BASE, WRIST = "observation.state", "observation.images.base", "observation.images.wrist"
PACKAGE = "lerobot_policy_torchpi"


def forget_package():
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def plugin():
    """A function that imports a module of the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", importlib.metadata.version)
        lerobot_stand_in.install(lambda name, module: patch.setitem(sys.modules, name, module))
        lerobot_stand_in.POLICIES.clear()
        importlib.import_module(PACKAGE)
        yield lambda name: importlib.import_module(f"{PACKAGE}.{name}")
        forget_package()


@pytest.fixture(scope="module")
def demo():
    return torchpi.load_policy("demo")


@pytest.fixture(scope="module")
def acting(plugin):
    """A policy loaded for inference; tests that change its config restore it."""
    return policy(plugin)


def policy(plugin, **options):
    config = plugin("configuration_torchpi").TorchpiConfig(**{"checkpoint": "demo", "dtype": "float32", **options})
    return plugin("modeling_torchpi").TorchpiPolicy(config)


def batch(count=1, **changes):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, count, 3, 48, 64), np.uint8))
    state = torch.tensor(rng.uniform(-0.1, 0.3, (count, 4)), dtype=torch.float32)
    made = {BASE: images[0] / 255, WRIST: images[1] / 255, STATE: state, "task": ["open the drawer"] * count}
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def request(values, row=0):
    """The same observation as the demo's robot sends it."""
    images = {
        name: (values[key][row] * 255).round().to(torch.uint8) for name, key in (("base", BASE), ("wrist", WRIST))
    }
    images = {name: image.permute(1, 2, 0).numpy() for name, image in images.items()}
    return {**images, "state": values[STATE][row].numpy(), "prompt": values["task"][row]}


def noise(count=1):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((count, CHUNK, WIDTH), np.float32))


@pytest.mark.parametrize("version", ["0.5.1", "0.6.0", "0.7.0"])
def test_unsupported_lerobot_version_is_an_error_at_import(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)
    lerobot_stand_in.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module), version)
    forget_package()
    with pytest.raises(ImportError, match=rf"works with LeRobot from 0\.6\.1.*found {version}.*pip install"):
        importlib.import_module(PACKAGE)


def test_chunk_equals_torchpi(acting, demo):
    values, start = batch(2), noise(2)
    chunk = acting.predict_action_chunk(values, noise=start)
    expected = [demo.infer(request(values, row), noise=start[row].numpy())["actions"] for row in (0, 1)]
    np.testing.assert_allclose(chunk.numpy(), np.stack(expected), atol=1e-5)


def test_actions_of_a_chunk_are_executed_in_order_until_reset(plugin, acting):
    acting.reset()
    values, start = batch(), noise()
    chunk = acting.predict_action_chunk(values, noise=start)
    steps = acting.metadata["execute_steps"]
    taken = [acting.select_action(values, noise=start) for _ in range(steps + 1)]
    torch.testing.assert_close(torch.stack(taken, dim=1), chunk[:, [*range(steps), 0]])
    acting.reset()
    torch.testing.assert_close(acting.select_action(values, noise=start), chunk[:, 0])


def test_chunk_continues_the_previous_one_like_torchpi(acting, demo):
    values, start = batch(), noise()
    chunk = acting.predict_action_chunk(values, noise=start)[0]
    left, other = chunk[6:], noise().flip(1)
    expected = demo.infer(request(values), noise=other[0].numpy(), action_prefix=left.numpy(), delay=3)["actions"]
    for given in (left, left[None], torch.cat([left, torch.zeros(5, 4)])):  # LeRobot pads with zeros
        found = acting.predict_action_chunk(values, inference_delay=3, prev_chunk_left_over=given, noise=other)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-4)
    short = demo.infer(request(values), noise=other[0].numpy(), action_prefix=left[:5].numpy(), delay=5)["actions"]
    late = {"inference_delay": 9, "prev_chunk_left_over": left, "execution_horizon": 5, "noise": other}
    np.testing.assert_allclose(acting.predict_action_chunk(values, **late)[0].numpy(), short, atol=1e-4)


def test_previous_chunk_is_ignored_if_used_up_or_disabled(acting):
    values, start = batch(), noise()
    free = acting.predict_action_chunk(values, noise=start)
    used = acting.predict_action_chunk(values, prev_chunk_left_over=torch.zeros(10, 4), inference_delay=2, noise=start)
    acting.config.rtc_config = RTCConfig(enabled=False)
    off = acting.predict_action_chunk(values, prev_chunk_left_over=torch.ones(10, 4), noise=start)
    acting.config.rtc_config = None
    assert torch.equal(free, used)
    assert torch.equal(free, off)
    with pytest.raises(ValueError, match="2 previous chunks for 1 observations"):
        acting.predict_action_chunk(values, prev_chunk_left_over=torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WRIST: None}, r"no camera for wrist.*cameras=.*\"wrist\": \"observation\.images\.base\""),
        ({"observation.images.left.wrist": torch.zeros(1, 3, 8, 8)}, "end in wrist; choose the one for"),
        ({STATE: None}, r"no observation\.state, from which the policy reads hand_x, hand_y"),
        ({STATE: torch.zeros(1, 5)}, "has 5 dimensions, the policy reads 4: hand_x"),
        ({STATE: torch.zeros(1, 2)}, "expects 4 numbers: hand_x"),
        ({STATE: torch.zeros(1, 1, 4)}, "one observation step"),
        ({BASE: torch.full((1, 3, 8, 8), 255.0)}, "from 255 to 255; expected uint8"),
        ({BASE: torch.full((1, 3, 8, 8), torch.nan)}, "expected uint8, or numbers in"),
        ({BASE: torch.zeros(1, 1, 8, 8)}, "expected colours"),
        ({"task": ["a", "b"]}, "2 tasks for 1 observations"),
    ],
)
def test_error_about_an_invalid_batch_names_the_key(acting, changes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        acting.predict_action_chunk(batch(**changes))


def test_blank_task_uses_the_default_prompt(plugin):
    form = {"cameras": [], "state": [{"key": "state", "names": ["a", "b", "c", "d"]}]}
    rows = plugin("observations").requests_of(batch(2, task=["", "go"]), form, {})
    assert [row.get("prompt") for row in rows] == [None, "go"]


def test_images_and_state_equal_the_robots_observation(plugin):
    cameras = [
        {"key": "images.base", "layout": "chw", "dtype": "uint8", "presence": "required"},
        {"key": "observation/side", "layout": "hwc", "dtype": "float32", "presence": "required"},
        {"key": "images.other", "layout": "hwc", "dtype": "uint8", "presence": "optional"},
    ]
    form = {"cameras": cameras, "state": [{"key": "arm", "names": ["a", "b", "c"]}, {"key": "hand", "names": ["d"]}]}
    values = batch()
    (row,) = plugin("observations").requests_of(values, form, {"side": WRIST})
    assert set(row) == {"images.base", "observation/side", "arm", "hand", "prompt"}
    assert (row["images.base"].dtype, row["images.base"].shape) == (np.uint8, (3, 48, 64))
    np.testing.assert_allclose(row["observation/side"], values[WRIST][0].permute(1, 2, 0), atol=1e-7)
    np.testing.assert_array_equal([*row["arm"], *row["hand"]], values[STATE][0])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"output_features": {"action": Feature((7,))}}, "action has 7 dimensions, the policy's has 4: delta_x"),
        ({"input_features": {STATE: Feature((4,)), BASE: Feature((3, 8, 8))}}, "no camera for wrist"),
        ({"input_features": {BASE: Feature((3, 8, 8)), WRIST: Feature((3, 8, 8))}}, r"no observation\.state"),
        ({"cameras": {"side": BASE}, "input_features": {BASE: Feature((3, 8, 8))}}, "no camera side"),
    ],
)
def test_features_of_another_robot_are_an_error_at_construction(plugin, features, message):
    with pytest.raises((ValueError, KeyError), match=message):
        policy(plugin, **features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune": "lora"}, "finetune is 'lora'; expected one of full"),
        ({"dtype": "float16"}, "expected one of float32, bfloat16"),
        ({"n_action_steps": 0}, "at least 1"),
        ({"n_action_steps": 17}, "chunks have 16 actions"),
        ({"normalization_mapping": {"STATE": NormalizationMode.MEAN_STD}}, "normalizes STATE"),
        ({"norm_stats": "dataset"}, "there is no training dataset"),
        ({"checkpoint": None}, r"--policy\.checkpoint="),
    ],
)
def test_invalid_options_are_errors(plugin, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        policy(plugin, **options)


class Meta:
    """Stand-in for LeRobot's metadata of a dataset."""

    repo_id, fps = "local/hand", 80

    def __init__(self, root):
        self.root = root


def write_dataset(root, *, fps=80, action=("dx", "dy", "dz", "gripper")):
    shape, rng = (32, 32, 3), np.random.default_rng(0)
    state = ("x", "y", "z", "gripper")
    cameras = {"base": shape, "wrist": shape}
    with LeRobotWriter(root, fps=fps, cameras=cameras, state_names=state, action_names=action) as writer:
        for episode in range(2):
            for step in range(20):
                values = np.array([0.1 * episode + 0.001 * step, 0.01 * step, 0.02 * step, step % 2], np.float32)
                images = {key: rng.integers(0, 256, shape, np.uint8) for key in (BASE, WRIST)}
                writer.add_frame({**images, STATE: values, "action": np.sin(values)})
            writer.save_episode("open the drawer")
    file = next(root.glob("data/*/*.parquet")).relative_to(root)
    metadata = {"root": root, "fps": fps, "repo_id": "local/hand", "total_episodes": 2}  # as LeRobot's
    return types.SimpleNamespace(**metadata, get_data_file_path=lambda episode: file)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "hand")


def trained(plugin, meta, **options):
    config = plugin("configuration_torchpi").TorchpiConfig(**{"checkpoint": "demo", "dtype": "float32", **options})
    return plugin("modeling_torchpi").TorchpiPolicy(config, dataset_meta=meta, dataset_stats={})


def test_loss_equals_torchpi(plugin, dataset, demo):
    made = trained(plugin, dataset)
    frame = LeRobotDataset(dataset.root, action_horizon=CHUNK)[10]
    start, time = noise(), torch.tensor([0.4])
    values = batch(action=torch.from_numpy(frame["action"])[None])
    loss, _ = made.forward(values, noise=start, time=time)
    inputs = demo.prepare({**request(values), "actions": frame["action"]})[1]
    actions = torch.from_numpy(inputs["actions"])[None].float()
    expected = demo.model.compute_loss(torchpi.collate.collate([inputs]), actions, noise=start, time=time)
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    assert all(parameter.requires_grad for parameter in made.get_optim_params())
    assert made.config.action_delta_indices == list(range(CHUNK))


def test_only_the_expert_is_trained(plugin, dataset):
    made = trained(plugin, dataset, finetune="expert")
    trainable = {name.split(".")[1] for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trainable == {"expert", "suffix", "action_out_proj"}


def test_training_a_policy_loaded_for_inference_is_an_error(acting):
    with pytest.raises(ValueError, match="loaded for inference"):
        acting.forward(batch(action=torch.zeros(1, CHUNK, 4)))


def test_statistics_come_from_checkpoint_or_dataset(plugin, dataset, demo):
    own, of_dataset = trained(plugin, dataset), trained(plugin, dataset, norm_stats="dataset")
    frames = LeRobotDataset(dataset.root, action_horizon=CHUNK)
    computed = compute_norm_stats(frames, demo.embodiment, action_horizon=CHUNK)
    for made, expected in ((own, demo.transforms.norm_stats), (of_dataset, computed)):
        for what, stats in expected.items():
            np.testing.assert_allclose(made.torchpi.transforms.norm_stats[what].q01, stats.q01, atol=1e-6)


def test_base_model_for_a_new_robot_uses_the_datasets_statistics(plugin, dataset, golden_pi05, tmp_path):
    names = ["x", "y", "z", "gripper"]
    cameras = {"base_0_rgb": "base", "left_wrist_0_rgb": "wrist"}
    arm = Embodiment.generic("arm", cameras=cameras, state=names, actions=names, delta=names[:3], command="position")
    (tmp_path / "arm.json").write_text(json.dumps(arm.to_dict()))
    base = {"checkpoint": str(golden_pi05.checkpoint), "model_config": str(golden_pi05.config)}
    base["tokenizer"] = str(golden_pi05.root.parent / "tokenizer" / "tiny_spm.model")
    with pytest.raises(KeyError, match=r"does not say which robot.*--policy\.embodiment=.*data draft"):
        trained(plugin, dataset, **base)
    made = trained(plugin, dataset, **base, embodiment=str(tmp_path / "arm.json"))
    horizon = made.metadata["action_horizon"]
    assert made.config.action_delta_indices == list(range(horizon))
    frames = LeRobotDataset(dataset.root, action_horizon=horizon)
    expected = compute_norm_stats(frames, arm, action_horizon=horizon)["actions"]  # relative to the state
    np.testing.assert_allclose(made.torchpi.transforms.norm_stats["actions"].q99, expected.q99, atol=1e-6)
    assert made.metadata["control_hz"] == 80


def test_episodes_not_downloaded_by_lerobot_are_skipped(plugin, dataset):
    first = {**vars(dataset), "get_data_file_path": lambda i: dataset.get_data_file_path(i) if i == 0 else "none"}
    made = trained(plugin, types.SimpleNamespace(**first), norm_stats="dataset")
    assert made.torchpi.transforms.norm_stats["state"].mean[0] < 0.05  # about 0.1 in the second


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"checkpoint": "demo"}, "demo"),
        ({"pretrained_path": "org/name"}, "hf://org/name"),
        ({"pretrained_path": "org/name", "pretrained_revision": "v2", "checkpoint": "demo"}, "hf://org/name@v2"),
    ],
)
def test_address_comes_from_lerobots_path_or_the_checkpoint(plugin, options, expected):
    assert plugin("local").address(plugin("configuration_torchpi").TorchpiConfig(**options)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 30}, "30 frames per second, and 'metaworld' acts at 80 Hz"),
        ({"action": ("gripper", "dx", "dy", "dz")}, "another order than 'metaworld'"),
    ],
)
def test_dataset_of_another_robot_is_an_error(plugin, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trained(plugin, write_dataset(tmp_path / "set", **changes))


def test_saved_policy_is_a_policy_folder_and_loads_again(plugin, dataset, tmp_path):
    made = trained(plugin, dataset, norm_stats="dataset")
    with torch.no_grad():
        made.model.action_out_proj.bias += 0.25
    made.save_pretrained(tmp_path / "own")
    gathered = {name: value.clone() for name, value in made.state_dict().items()}
    made.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    values, start = batch(), noise()
    expected = made.predict_action_chunk(values, noise=start)
    for name in ("own", "gathered"):
        assert format_of(tmp_path / name) == "torchpi"
        again = type(made).from_pretrained(tmp_path / name)
        assert torch.equal(again.predict_action_chunk(values, noise=start), expected)
        assert not again.training
    loaded = torchpi.load_policy(tmp_path / "own")
    assert loaded.provenance["dataset"] == "local/hand"
    np.testing.assert_allclose(loaded.infer(request(values), noise=start[0].numpy())["actions"], expected[0], atol=1e-6)

    config = plugin("configuration_torchpi").TorchpiConfig(checkpoint="demo", norm_stats="dataset", embodiment="so101")
    with pytest.raises(ValueError, match=r"saved with embodiment None, but 'so101' is requested.*policy\.checkpoint="):
        type(made).from_pretrained(tmp_path / "own", config=config)


def test_folder_with_two_formats_is_an_error(plugin, dataset, tmp_path):
    trained(plugin, dataset).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "pi05"}')
    with pytest.raises(ValueError, match="two formats, torchpi and lerobot"):
        format_of(tmp_path)


def test_peft_is_an_error(acting):
    with pytest.raises(ValueError, match="torchpi train --finetune lora"):
        acting.wrap_with_peft()


@pytest.fixture(scope="module")
def server(demo):
    with running_server({"demo": lambda: demo}) as (url, _):
        yield url


def remote(plugin, url, **options):
    config = plugin("configuration_torchpi_remote").TorchpiRemoteConfig(server=url, **options)
    return plugin("modeling_torchpi_remote").TorchpiRemotePolicy(config)


def test_remote_chunk_continues_the_previous_one(plugin, server):
    made, values = remote(plugin, server), batch(2)
    chunk = made.predict_action_chunk(values)
    assert chunk.shape == (2, CHUNK, 4)
    assert made.supports_rtc()
    free = made.predict_action_chunk(values)
    for left in (chunk[:, 4:], chunk):  # LeRobot may ask before an action was executed
        guided = made.predict_action_chunk(values, inference_delay=4, prev_chunk_left_over=left)
        errors = [(each[:, :4] - left[:, :4]).abs().mean() for each in (guided, free)]
        assert errors[0] < 0.7 * errors[1]


def test_remote_policy_has_no_weights_to_train_or_save(plugin, server, tmp_path):
    made = remote(plugin, server)
    made.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert type(made).from_pretrained(tmp_path).metadata["action_names"] == made.metadata["action_names"]
    for call in (lambda: made.forward({}), made.get_optim_params, made.config.get_optimizer_preset):
        with pytest.raises(ValueError, match="is not trained"):
            call()
    with pytest.raises(ValueError, match="takes no noise"):
        made.predict_action_chunk(batch(), noise=noise())


def test_server_without_observation_metadata_is_an_error(plugin):
    with pytest.raises(ValueError, match=r"does not state observation, action_names.*torchpi serve"):
        plugin("observations").require_format({"action_horizon": 10}, "The policy of ws://there")
    with pytest.raises(KeyError, match=r"--policy\.server=ws"):
        remote(plugin, None)


def test_clipped_actions_are_logged_once_per_episode(acting, caplog):
    acting.reset()
    for _ in range(2):
        acting._note([{"actions_clipped": 3}])
    assert caplog.text.count("3 values of a chunk exceeded the robot's limits") == 1
    acting.reset()
    acting._note([{"actions_clipped": 2}])
    assert "2 values" in caplog.text
