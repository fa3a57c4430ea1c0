"""Both policy types in LeRobot's own programs: lerobot-train, lerobot-eval and lerobot-rollout.

Needs an environment with LeRobot; scripts/test_lerobot_plugin.sh creates one.
"""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from mock_robot import MAX_ACTIONS, ROBOTS

import torchpi
from lerobot_policy_torchpi.errors import MissingKeyError, PluginError
from torchpi.data import to_observation
from torchpi.policy import policy_of
from torchpi.robots import Embodiment
from torchpi.serving.server import running_server
from torchpi.transforms.normalize import NormStats

CHUNK = 16
register_third_party_plugins()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def lerobot(monkeypatch, script, *arguments):
    """Run one of LeRobot's programs."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    importlib.import_module(f"lerobot.scripts.{script}").main()


def write_dataset(root, *, fps=80, cameras=("base", "wrist"), action=("dx", "dy", "dz", "gripper")):
    """Write three episodes of 24 frames with LeRobot."""
    image = {"dtype": "image", "shape": (48, 48, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{name}": image for name in cameras}
    features["observation.state"] = {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]}
    features["action"] = {"dtype": "float32", "shape": (len(action),), "names": list(action)}
    dataset = LeRobotDataset.create("local/hand", fps=fps, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(3):
        for step in range(24):
            state = np.array([0.1 * episode, 0.02 * step, 0.2 + 0.01 * step, step % 2], np.float32)
            frame = {f"observation.images.{name}": rng.integers(0, 256, (48, 48, 3), np.uint8) for name in cameras}
            move = np.resize(np.sin(state + step), len(action)).astype(np.float32)
            dataset.add_frame({**frame, "observation.state": state, "action": move, "task": f"move to {episode}"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "hand")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """Run folder of `lerobot-train` with two checkpoints."""
    run = tmp_path_factory.mktemp("run") / "train"
    with pytest.MonkeyPatch.context() as monkeypatch:
        lerobot(
            monkeypatch,
            "lerobot_train",
            *("--policy.type=torchpi", "--policy.checkpoint=demo", "--policy.device=cpu", "--policy.push_to_hub=false"),
            *("--policy.norm_stats=dataset", "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=1"),
            *("--dataset.repo_id=local/hand", f"--dataset.root={dataset}", f"--output_dir={run}"),
            *("--batch_size=4", "--steps=8", "--save_freq=4", "--log_freq=1", "--num_workers=0"),
        )
    return run


@pytest.fixture(scope="module")
def server():
    with running_server({"demo": lambda: torchpi.load_policy("demo")}) as (url, _):
        yield url


def made(dataset, **options):
    """Policy that LeRobot creates for a dataset, with the dataset's metadata and a batch."""
    config = make_policy_config("torchpi", **{"checkpoint": "demo", "device": "cpu", **options})
    meta = LeRobotDatasetMetadata("local/hand", root=dataset)
    steps = [i / meta.fps for i in config.action_delta_indices]
    frames = LeRobotDataset("local/hand", root=dataset, delta_timestamps={"action": steps})
    policy = make_policy(config, ds_meta=meta)
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=meta.stats)
    batch = next(iter(torch.utils.data.DataLoader(frames, batch_size=3, sampler=[0, 20, 47])))
    for key in meta.camera_keys:
        batch[key] = batch[key].float() / (255 if batch[key].dtype == torch.uint8 else 1)
    return policy, preprocessor(batch), postprocessor


def test_loss_equals_torchpi_for_the_same_frames(dataset):
    policy, batch, _ = made(dataset, dtype="float32")
    rng = np.random.default_rng(1)
    noise = torch.from_numpy(rng.standard_normal((3, CHUNK, policy.model.config.action_dim), np.float32))
    time = torch.tensor([0.1, 0.5, 0.9])
    loss, logged = policy.forward(batch, noise=noise, time=time)

    own = torchpi.load_policy("demo", dtype=torch.float32)
    frames = torchpi.data.LeRobotDataset(dataset, action_horizon=CHUNK)
    expected = []
    for row, index in enumerate((0, 20, 47)):
        inputs = own.prepare(to_observation(frames[index], own.embodiment))[1]
        observation = torchpi.collate.collate([inputs])
        actions = torch.from_numpy(inputs["actions"][None]).float()
        expected.append(
            own.model.compute_loss(observation, actions, noise=noise[row : row + 1], time=time[row : row + 1])
        )
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=0, atol=1e-6)
    per_sample, _ = policy.forward(batch, "none", noise=noise, time=time)
    torch.testing.assert_close(per_sample, torch.cat(expected).mean(dim=1), rtol=0, atol=1e-5)
    assert logged == {}


def test_training_lowers_the_loss_and_saves_a_policy_for_both_programs(trained, dataset):
    folder = trained / "checkpoints" / "000008" / "pretrained_model"
    before, batch, _ = made(dataset, norm_stats="dataset")
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path, config.dtype = folder, "float32"
    after = make_policy(config, ds_meta=LeRobotDatasetMetadata("local/hand", root=dataset))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(3, CHUNK, before.model.config.action_dim, generator=rng)
    losses = [
        float(policy.forward(batch, noise=noise, time=torch.tensor([0.2, 0.5, 0.8]))[0]) for policy in (before, after)
    ]
    assert losses[1] < 0.9 * losses[0]

    own = torchpi.load_policy(folder, dtype=torch.float32)
    assert own.provenance["source"] == "lerobot-train"
    frame = torchpi.data.LeRobotDataset(dataset, action_horizon=CHUNK)[20]
    request = {key: value for key, value in to_observation(frame, own.embodiment).items() if key != "actions"}
    expected = own.infer(request, noise=noise[1].numpy())["actions"]
    chunk = after.predict_action_chunk(batch, noise=noise)
    np.testing.assert_allclose(chunk[1].numpy(), expected, atol=1e-5)


def test_resumed_run_continues_with_the_saved_weights(trained, monkeypatch, tmp_path):
    recipe = trained / "checkpoints" / "000004" / "pretrained_model" / "train_config.json"
    lerobot(
        monkeypatch,
        "lerobot_train",
        *(f"--config_path={recipe}", "--resume=true", "--steps=8", f"--output_dir={tmp_path / 'resumed'}"),
    )
    steps = [
        json.loads((path / "training_state" / "training_step.json").read_text())["step"]
        for path in sorted((trained / "checkpoints").glob("0*"))
    ]
    assert steps[-1] == 8


def test_changing_a_saved_policys_source_is_an_error(trained, dataset):
    folder = trained / "checkpoints" / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--embodiment=so101"])
    config.pretrained_path = folder
    with pytest.raises(PluginError, match=r"saved with embodiment None.*--policy\.checkpoint="):
        make_policy(config, ds_meta=LeRobotDatasetMetadata("local/hand", root=dataset))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ("base", "side")}, r"no camera for wrist.*observation\.images\.side"),
        ({"action": ("dx", "dy", "dz")}, "action has 3 dimensions"),
        ({"action": ("gripper", "dx", "dy", "dz")}, "another order|not 'gripper'|are other joints"),
        ({"fps": 30}, "30 frames per second.*80 Hz"),
    ],
)
def test_dataset_of_another_robot_is_an_error_that_names_it(tmp_path, changes, message):
    root = write_dataset(tmp_path / "other", **changes)
    with pytest.raises((ValueError, KeyError), match=message):
        made(root)


def test_renamed_camera_is_read(tmp_path):
    root = write_dataset(tmp_path / "other", cameras=("base", "side"))
    policy, batch, _ = made(root, cameras={"wrist": "observation.images.side"})
    swapped = {**batch, "observation.images.side": 1 - batch["observation.images.side"]}
    noise = torch.zeros(3, CHUNK, policy.model.config.action_dim)
    one, other = (policy.predict_action_chunk(each, noise=noise) for each in (batch, swapped))
    assert (one - other).abs().max() > 1e-4


def pusht_policy(root):
    """Policy with the demo's weights and the actions of gym-pusht."""
    demo = torchpi.load_policy("demo")
    table = Embodiment.generic(
        "pusht",
        cameras={"base_0_rgb": "image"},
        state=["x", "y"],
        actions=["x", "y"],
        command="position",
        control_hz=10,
        execute_steps=4,
        default_prompt="push the T",
    )
    stats = NormStats(np.full(2, 256.0), np.full(2, 100.0), np.full(2, 50.0), np.full(2, 460.0))
    spec = {**vars(demo.spec), "embodiment": table, "norm_stats": {"state": stats, "actions": stats}, "metadata": {}}
    policy_of(demo.model, type(demo.spec)(**spec)).save(root)
    return root


def test_lerobot_eval_runs_the_policy_in_an_environment(monkeypatch, tmp_path):
    out = tmp_path / "eval"
    lerobot(
        monkeypatch,
        "lerobot_eval",
        *("--policy.type=torchpi", f"--policy.checkpoint={pusht_policy(tmp_path / 'policy')}", "--policy.device=cpu"),
        *("--env.type=pusht", "--env.episode_length=12", "--eval.batch_size=2", "--eval.n_episodes=2"),
        *("--eval.use_async_envs=false", f"--output_dir={out}"),
    )
    overall = json.loads((out / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2
    assert np.isfinite(overall["avg_sum_reward"])


ROLLOUT = ("--robot.type=mock", "--task=open the drawer", "--fps=20", "--duration=300", "--play_sounds=false")
LOCAL = ("--policy.type=torchpi", "--policy.checkpoint=demo", "--policy.device=cpu")


@pytest.mark.parametrize("inference", ["sync", "rtc"])
@pytest.mark.parametrize("kind", ["local", "remote", "saved"])
def test_lerobot_rollout_controls_a_robot(monkeypatch, kind, inference, server, trained):
    policy = {
        "local": LOCAL,
        "remote": ("--policy.type=torchpi_remote", f"--policy.server={server}", "--policy.device=cpu"),
        "saved": (f"--policy.path={trained / 'checkpoints' / 'last' / 'pretrained_model'}",),
    }[kind]
    rtc = ("--inference.queue_threshold=8",) if inference == "rtc" else ()
    lerobot(
        monkeypatch,
        "lerobot_rollout",
        *(*policy, *ROLLOUT, f"--inference.type={inference}", *rtc, "--return_to_initial_position=false"),
    )
    sent = np.array(ROBOTS[-1].sent)
    assert len(sent) == MAX_ACTIONS > CHUNK
    assert np.isfinite(sent).all()
    assert np.abs(sent).max() < 5


def test_remote_policy_equals_the_one_in_the_process(server, dataset):
    _, batch, _ = made(dataset)
    remote = make_policy(
        make_policy_config("torchpi_remote", server=server, device="cpu"),
        ds_meta=LeRobotDatasetMetadata("local/hand", root=dataset),
    )
    chunk = remote.predict_action_chunk(batch)
    assert chunk.shape == (3, CHUNK, 4)
    guided = remote.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=chunk[:, 4:])
    free = remote.predict_action_chunk(batch)
    error = [(each[:, :3] - chunk[:, 4:7]).abs().mean() for each in (guided, free)]
    assert error[0] < 0.5 * error[1]
    with pytest.raises(PluginError, match="not trained"):
        remote.forward(batch)


def test_remote_policy_is_saved_without_weights(server, tmp_path):
    remote = make_policy_config("torchpi_remote", server=server, device="cpu")
    policy = importlib.import_module("lerobot_policy_torchpi.modeling_torchpi_remote").TorchpiRemotePolicy(remote)
    policy.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    again = type(policy).from_pretrained(tmp_path)
    assert again.metadata["action_horizon"] == CHUNK


def test_remote_policy_needs_no_torchpi():
    program = "import sys, lerobot_policy_torchpi.modeling_torchpi_remote; assert 'torchpi' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_policy_without_an_address_names_the_option():
    with pytest.raises(MissingKeyError, match=r"--policy\.checkpoint="):
        make_policy_config("torchpi", device="cpu").action_delta_indices  # noqa: B018


def test_tokenizer_is_uploaded_with_the_policy(trained, monkeypatch, tmp_path):
    """LeRobot's own upload only includes *.safetensors, *.json, *.yaml and *.md."""
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.policies import pretrained

    from lerobot_policy_torchpi import modeling_torchpi

    uploaded = []

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            uploaded.extend(path.name for path in pathlib.Path(folder_path).iterdir() if path.suffix != ".model")
            return type("Commit", (), {"repo_url": type("Url", (), {"url": "there"})})

        def upload_file(self, path_in_repo, **_):
            uploaded.append(path_in_repo)

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    card = type("Card", (), {"save": lambda self, path: pathlib.Path(path).touch()})
    monkeypatch.setattr(modeling_torchpi.TorchpiPolicy, "generate_model_card", lambda self, *_, **__: card())
    monkeypatch.setattr(modeling_torchpi, "HfApi", Hub)
    folder = trained / "checkpoints" / "last" / "pretrained_model"
    recipe = TrainPipelineConfig.from_pretrained(folder)
    policy = modeling_torchpi.TorchpiPolicy.from_pretrained(folder)
    policy.config.repo_id = "someone/hand"
    policy.push_model_to_hub(recipe)
    assert {"policy.json", "model.safetensors", "norm_stats.json", "config.json", "tokenizer.model"} <= set(uploaded)
