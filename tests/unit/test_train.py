"""Training on a small dataset: files of a run, exact resuming, sample order, recipes and errors."""

import collections
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from process_helpers import interruptible
from train_helpers import SIZES, assert_same_bits, small_recipe, weights, write_dataset

import torchpi
from torchpi.cli import main
from torchpi.data import LeRobotDataset, compute_norm_stats
from torchpi.data.edit import split_dataset
from torchpi.data.video import default_encoder, encode_video
from torchpi.errors import DatasetError, TrainingError
from torchpi.model.pi0 import Pi0
from torchpi.robots import metaworld
from torchpi.training import loop, state
from torchpi.training.config import EvalConfig, ModelConfig, OptimConfig, ParallelConfig, Source, TrainConfig
from torchpi.training.distributed import single_process
from torchpi.training.run_folder import METRICS, resume_config
from torchpi.training.samples import Frames, SampleRng, Samples, TrainingOrder
from torchpi.training.setup import build_policies, open_data
from torchpi.training.weights import build_model, model_config
from torchpi.transforms.normalize import NormStats, save_norm_stats


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def recipe(dataset):
    return small_recipe(
        dataset, num_steps=6, flow_samples_per_obs=2, warmup_steps=2, state_noise=0.05, eval_every=3, save_every=3,
        log_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = loop.train(recipe.replace(chunk_samples=2), run)
    return run, result


def test_run_writes_recipe_metrics_curves_report_and_policy(whole_run, recipe):
    run, result = whole_run
    assert not result.interrupted
    assert result.step == 6
    assert TrainConfig.from_json(run / "train.json") == recipe.replace(decay_steps=6, chunk_samples=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "holdout_loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "chunk_error" in line] == [3, 6]
    assert result.report.stat().st_size > 0
    assert (run / "curves.png").stat().st_size > 0
    policy = torchpi.load_policy(result.policy)
    assert policy.provenance["recipe"]["num_steps"] == 6
    chunk = policy.infer(policy.example_observation(), noise=np.zeros((4, 6), np.float32))["actions"]
    assert chunk.shape == (4, 4)


def test_policy_has_ema_weights(whole_run):
    run, result = whole_run
    saved = weights(run)
    policy = dict(torchpi.load_policy(result.policy).model.named_parameters())
    trained = [name for name in policy if f"ema.{name}" in saved]
    assert all(torch.equal(policy[name], saved[f"ema.{name}"]) for name in trained)
    # Parameters that the loss does not depend on are not in the state.
    last = "attention.out.weight", "feed_forward.gate_up.weight", "feed_forward.down.weight", "pre_ffw_norm.scale"
    assert set(policy) - set(trained) == {f"backbone.layers.1.{n}" for n in last} | {"backbone.final_norm.scale"}
    assert not torch.equal(saved["ema.action_out_proj.weight"], saved["weights.action_out_proj.weight"])


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(whole_run, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    true_update, calls = loop.update, []

    def interrupted_update(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return true_update(*args)

    monkeypatch.setattr(loop, "update", interrupted_update)
    result = loop.train(recipe, run)
    assert (result.interrupted, result.step) == (True, 2)
    monkeypatch.setattr(loop, "update", true_update)
    result = loop.train(resume_config(run), run, resume=True)
    assert (result.interrupted, result.step) == (False, 6)
    assert_same_bits(weights(run), weights(whole_run[0]))


@pytest.mark.slow
def test_ctrl_c_stops_after_the_current_update_and_saves(recipe, tmp_path):
    """The signal goes to the whole process group, worker processes included, as from a terminal."""
    run, arguments = tmp_path / "run", ["--dataset", recipe.data.dataset, "--embodiment", "metaworld", "--out"]
    options = [
        "--num-steps",
        "1000000",
        "--batch-size",
        "4",
        "--warmup-steps",
        "2",
        "--log-every",
        "1",
        "--workers",
        "1",
        "--model",
    ]
    command = ["-m", "torchpi.cli", "train", *arguments, run, *options, recipe.model.config]
    with interruptible(*command) as process:
        deadline = time.monotonic() + 120
        while not (run / METRICS).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    (checkpoint,) = state.checkpoints(run)
    assert f"interrupted after {int(checkpoint.name)} steps; continue with: torchpi train --resume {run}" in out


def begin(recipe: TrainConfig):
    """Data, policy and state of a recipe, built like `train` does in one process."""
    sizes = model_config(recipe, None)
    data = open_data(recipe, sizes)
    model, _ = build_model(recipe, sizes, skeleton=False)
    (policy,) = build_policies(recipe, model, data)
    return data[0], policy, state.TrainState.create(model, weight_decay=0.0, ema=True)


def test_policy_lists_only_tasks_and_episodes_left_after_an_edit(recipe, dataset, tmp_path):
    texts = LeRobotDataset(dataset, action_horizon=1, cameras=()).tasks
    whole = pathlib.Path(shutil.copytree(dataset, tmp_path / "whole"))
    document = {"env": "metaworld", "tasks": {"first": texts[0], "second": texts[1]}, "episodes": [{"length": 6}] * 4}
    (whole / "meta/torchpi_recording.json").write_text(json.dumps(document))
    _, policy, _ = begin(recipe.replace(dataset=str(whole)))
    about = policy.provenance["dataset"]
    assert (policy.provenance["tasks"], about["num_episodes"], about["num_frames"]) == (["first", "second"], 4, 24)
    split_dataset(whole, tmp_path / "parts", {"one": f"task:{texts[1]}"})
    _, policy, _ = begin(recipe.replace(dataset=str(tmp_path / "parts/one")))
    about = policy.provenance["dataset"]
    assert (policy.provenance["tasks"], about["num_episodes"], about["num_frames"]) == (["second"], 2, 12)
    assert about["tasks"] == {"second": texts[1]}
    (tmp_path / "parts/one/meta/torchpi_recording.json").write_text('{"tasks": []}')
    with pytest.raises(ValueError, match=r"torchpi_recording\.json has no object 'tasks': it is damaged"):
        begin(recipe.replace(dataset=str(tmp_path / "parts/one")))


def test_non_finite_gradient_raises_error_and_leaves_weights_unchanged(recipe):
    data, policy, begun = begin(recipe)
    some = Samples([Frames(data.train, data.embodiment, policy.transforms)], SampleRng(0, 1))
    batch = some.finish(some.collate([some[0, 0, 0, 0], some[0, 1, 0, 1]]), "cpu")
    before = {name: value.clone() for name, value in begun.tensors().items()}
    batch.noise[0] = torch.nan
    with pytest.raises(FloatingPointError, match="The gradient at step 0 has the norm nan"):
        loop.update(begun, recipe, [batch], single_process(policy.model))
    assert_same_bits(begun.tensors(), before)


def test_batch_of_a_failed_step_is_saved(recipe, tmp_path):
    """The learning rate makes the weights explode."""
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"nothing of this step is kept.*failed_step_.*torchpi stats"):
        loop.train(recipe.replace(lr=1e30, num_steps=50, save_every=50, eval_every=50), run)
    (file,) = run.glob("failed_step_*.safetensors")
    kept = safetensors.torch.load_file(file)
    assert kept["image.base_0_rgb"].shape == (4, 32, 32, 3)
    assert kept["indices"].shape == (4, 4)


def test_worker_processes_give_the_same_weights(whole_run, recipe, tmp_path):
    loop.train(recipe.replace(workers=1), tmp_path / "run")
    assert_same_bits(weights(tmp_path / "run"), weights(whole_run[0]))


def test_loss_falls_on_repeated_data(recipe, tmp_path):
    config = recipe.replace(num_steps=40, batch_size=8, eval_every=100, save_every=100, log_every=5)
    loop.train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_old_checkpoints_are_removed(recipe, tmp_path):
    loop.train(recipe.replace(save_every=1, keep=2), tmp_path / "run")
    assert [path.name for path in state.checkpoints(tmp_path / "run")] == ["00000005", "00000006"]


@pytest.mark.slow
def test_keep_every_keeps_checkpoints_at_its_multiples(recipe, tmp_path):
    loop.train(recipe.replace(save_every=1, keep=1, keep_every=2), tmp_path / "run")
    kept = [path.name for path in state.checkpoints(tmp_path / "run")]
    assert kept == ["00000002", "00000004", "00000006"]


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint_and_leaves_no_partial_files(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=3), run)
    longer = resume_config(run).replace(num_steps=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            loop.train(longer, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000003"]
    assert loop.train(longer, run, resume=True).step == 6


def test_resuming_for_more_steps_equals_one_long_run(recipe, tmp_path):
    """The schedule's end is the one of the first run."""
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=3), run)
    loop.train(resume_config(run).replace(num_steps=6), run, resume=True)
    at_once = tmp_path / "at_once"
    loop.train(recipe.replace(decay_steps=3), at_once)
    assert_same_bits(weights(run), weights(at_once))


def test_resuming_with_changed_data_raises_error(recipe, tmp_path):
    config = recipe.replace(dataset=str(tmp_path / "set"), num_steps=3)
    write_dataset(tmp_path / "set")
    loop.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "set")
    write_dataset(tmp_path / "set", episodes=5)
    with pytest.raises(ValueError, match=r"the dataset has changed since .* was saved: its statistics of state differ"):
        loop.train(resume_config(tmp_path / "run").replace(num_steps=6), tmp_path / "run", resume=True)


def test_resumed_run_keeps_its_held_out_episodes(recipe, tmp_path):
    """Even if run.json lists episodes that `hold_out` would not choose."""
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=1, norm_stats=str(stats_file(recipe, tmp_path))), run)
    about = json.loads((run / "run.json").read_text())
    others = [i for i in range(4) if i not in about["datasets"][0]["held_out"]]
    about["datasets"][0]["held_out"] = others
    (run / "run.json").write_text(json.dumps(about))
    longer = resume_config(run).replace(num_steps=2)
    loop.train(longer, run, resume=True)
    dataset = json.loads((run / "run.json").read_text())["datasets"][0]
    assert dataset["held_out"] == others
    assert dataset["episodes"] == 1
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json does not say which episodes the run holds out"):
        loop.train(longer, run, resume=True)


def test_statistics_file_in_another_unit_prints_warning(recipe, tmp_path, capsys):
    degrees = NormStats(np.zeros(4), np.ones(4), np.full(4, -200.0), np.full(4, 200.0))
    save_norm_stats(tmp_path / "norm_stats.json", {"state": degrees, "actions": degrees})
    loop.train(recipe.replace(num_steps=1, norm_stats=str(tmp_path / "norm_stats.json")), tmp_path / "run")
    printed = capsys.readouterr()
    shown = " ".join((printed.out + printed.err).split())
    assert "state hand_x, hand_y, hand_z: looks like radians, but the statistics are in degrees." in shown


def test_unrelated_statistics_raise_error_before_anything_is_written(recipe, tmp_path):
    four = [np.full(4, value) for value in (1.5691, 0.0003, 1.5686, 1.5696)]
    save_norm_stats(tmp_path / "norm_stats.json", dict.fromkeys(("state", "actions"), NormStats(*four)))
    refused = r"100\.0% of the state are outside q01\.\.q99, .* most of hand_x 100% .* Nothing can be trained"
    with pytest.raises(ValueError, match=refused):
        loop.train(recipe.replace(num_steps=1, norm_stats=str(tmp_path / "norm_stats.json")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def stats_file(recipe: TrainConfig, folder: pathlib.Path) -> pathlib.Path:
    """A file with statistics of all episodes, so that they do not depend on the held-out ones."""
    whole = LeRobotDataset(recipe.data.dataset, action_horizon=4, cameras=())
    save_norm_stats(folder / "norm_stats.json", compute_norm_stats(whole, metaworld(), action_horizon=4))
    return folder / "norm_stats.json"


def test_resuming_with_another_recipe_raises_error(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=3), run)
    changed = resume_config(run).replace(lr=0.5, batch_size=8, num_steps=6, workers=1)
    with pytest.raises(ValueError, match=r"batch_size was 4, now 8; lr was 0\.01, now 0\.5\. Options that may change"):
        loop.train(changed, run, resume=True)
    with pytest.raises(ValueError, match="has 3 steps already"):
        loop.train(resume_config(run).replace(num_steps=2), run, resume=True)


TEN = (np.arange(10),)


def order(frames=TEN, first_step=0, rank=0, world_size=1, **options) -> list[list[tuple]]:
    config = TrainConfig(**{"batch_size": 4, "seed": 3, "num_steps": 5, **options})
    return list(TrainingOrder(frames, config, first_step, rank, world_size))


def test_each_epoch_visits_every_frame_once_in_a_new_order():
    whole = order()
    frames = [frame for batch in whole for _, frame, _, _ in batch]
    assert sorted(frames[:10]) == sorted(frames[10:]) == list(range(10))
    assert frames[:10] != frames[10:]
    assert order(first_step=3) == whole[3:]
    assert [index[2:] for index in whole[2]] == [(2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_share_a_batch(world_size, accumulate):
    parts = [order(world_size=world_size, rank=rank, grad_accum_steps=accumulate) for rank in range(world_size)]
    together = [
        sorted(index for part in parts for batch in part[step * accumulate :][:accumulate] for index in batch)
        for step in range(5)
    ]
    assert together == [sorted(batch) for batch in order()]
    with pytest.raises(ValueError, match="batch_size 4 can't be divided by 3 processes"):
        order(world_size=3)


def test_mixture_follows_weights_and_visits_frames_evenly():
    frames, mixture = [np.arange(100), np.array([5, 7, 9])], (Source("a", "aloha", 3.0), Source("b", "aloha", 1.0))
    indices = [index for batch in order(frames, mixture=mixture, num_steps=40_000) for index in batch]
    of_second = [frame for source, frame, _, _ in indices if source == 1]
    assert len(of_second) / len(indices) == pytest.approx(0.25, abs=1e-3)
    counts = collections.Counter(of_second)
    assert set(counts) == {5, 7, 9}
    assert max(counts.values()) - min(counts.values()) <= 1
    # An order that starts later is the end of the whole order, even beyond a block of the mixture.
    resumed = [
        index for batch in order(frames, mixture=mixture, num_steps=40_000, first_step=20_000) for index in batch
    ]
    assert resumed == indices[20_000 * 4 :]
    rare = (Source("a", "aloha", 1e6), Source("b", "aloha", 1.0))
    with pytest.raises(ValueError, match=r"with the weight 1\.0 of 1000001\.0 is hardly ever drawn"):
        order(frames, mixture=rare)


def samples(recipe: TrainConfig, **rng) -> Samples:
    data, policy, _ = begin(recipe)
    frames = Frames(data.train, data.embodiment, policy.transforms)
    return Samples([frames], SampleRng(**{"seed": 0, "flow_samples_per_obs": 2, **rng}))


def test_random_numbers_of_a_sample_depend_only_on_its_index(recipe):
    some = samples(recipe, state_noise=0.1, augmentation=recipe.data.augmentation)
    one, again, elsewhere = some[0, 3, 7, 1], some[0, 3, 7, 1], some[0, 3, 7, 2]
    for key in ("noise", "time", "tokenized_prompt"):
        np.testing.assert_array_equal(one[key], again[key])
    assert (one["noise"] != elsewhere["noise"]).any()
    assert (one["augmentation"]["base_0_rgb"] != elsewhere["augmentation"]["base_0_rgb"]).any()


def test_error_in_a_sample_is_raised_with_its_batch(recipe, monkeypatch):
    some = samples(recipe)

    def damaged(*_):
        raise DatasetError("The video is damaged.")

    monkeypatch.setattr(Samples, "__getitem__", damaged)
    with pytest.raises(DatasetError, match="The video is damaged"):
        next(some.batches([[(0, 0, 0, 0)]], 0))


def test_time_has_the_distribution_of_the_model(recipe):
    some = samples(recipe, flow_samples_per_obs=4000)
    time = some[0, 0, 0, 0]["time"]
    assert time.min() > 0.001
    assert time.max() < 1
    assert time.mean() == pytest.approx(0.6 * 0.999 + 0.001, abs=0.015)  # Beta(1.5, 1) has the mean 0.6


def test_held_out_episodes_are_not_trained_on(recipe, dataset):
    config = recipe.replace(holdout=0.5)
    (data,) = open_data(config, model_config(config, None))
    assert len(data.train) == len(data.holdout) == 12
    assert not set(data.train.episode_indices) & set(data.holdout.episode_indices)
    for part in (data.train, data.holdout):  # both tasks
        assert set(part.columns["task_index"]) == {0, 1}
    assert len(LeRobotDataset(dataset, action_horizon=4)) == 24


def test_loss_of_several_flow_samples_is_the_mean_of_their_losses():
    model = Pi0(SIZES)
    torch.nn.init.normal_(model.expert.final_norm.dense.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(0)
    observation = torchpi.Observation.from_dict(
        {
            "image": {"base": torch.from_numpy(rng.integers(0, 256, (3, 32, 32, 3), np.uint8))},
            "state": torch.zeros(3, 6),
            "tokenized_prompt": torch.from_numpy(rng.integers(0, 1024, (3, 5))),
            "tokenized_prompt_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5]),
        }
    )
    actions, noise = torch.randn(3, 4, 6), torch.randn(3, 2, 4, 6)
    time = torch.rand(3, 2)
    together = model.compute_loss(observation, actions, noise=noise, time=time)
    apart = [model.compute_loss(observation, actions, noise=noise[:, i], time=time[:, i]) for i in range(2)]
    torch.testing.assert_close(together, torch.stack(apart).mean(dim=0))
    with pytest.raises(ValueError, match="R samples per observation, and time one number for each sample"):
        model.compute_loss(observation, actions, noise=noise, time=time[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "nowhere"}, "nowhere"),
        ({"embodiment": "no_robot"}, "no_robot"),
        ({"model": "no_model"}, "presets are"),
        ({"episodes": "0"}, "has 1 episode, of which none can be held out"),
        ({"embodiment": "libero"}, "its cameras are base, wrist"),
        ({"env": "metaworlds"}, "no environment 'metaworlds'"),
        ({"env": "so101"}, "do not fit"),
        ({"env": "metaworld", "env_tasks": "drawer-open, drawer-opens"}, "has no task 'drawer-opens'"),
        ({"model": None}, r"Say which weights to start from \(--init.*or the sizes"),
        ({"model": None, "init": "pi05_base"}, "the published one is gs://openpi-assets/checkpoints/pi05_base"),
        ({"trackers": ("paper",)}, "There is no tracker paper"),
        ({"batch_size": 5, "grad_accum_steps": 2}, "batch_size 5 can't be divided"),
        ({"device": "cuda:7"}, "There is no device cuda:7"),
    ],
)
def test_wrong_recipe_raises_error_before_anything_is_written(change, message, recipe, tmp_path):
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        loop.train(recipe.replace(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dataset_without_a_camera_of_the_robot_raises_error(recipe, tmp_path):
    write_dataset(tmp_path / "set", cameras=("base",))
    with pytest.raises(KeyError, match="wrist"):
        loop.train(recipe.replace(dataset=str(tmp_path / "set")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_shorter_than_warmup_and_ema_prints_warnings(recipe, tmp_path, capsys):
    loop.train(recipe.replace(num_steps=2, warmup_steps=1000, lr=1e-2, ema_decay=0.99), tmp_path / "short")
    shown = " ".join(capsys.readouterr().err.split())
    assert "warmup_steps 1000 is not below num_steps 2: the learning rate reaches 2e-05, not lr 0.01;" in shown
    assert "to reach it, pass --warmup-steps 0 (num_steps / 30, as in openpi)" in shown
    assert "keep 98 % of the initial ones after 2 steps" in shown
    loop.train(recipe.replace(num_steps=2, warmup_steps=1, ema_decay=0.0), tmp_path / "plain")
    assert "warning" not in capsys.readouterr().err


def test_frames_without_instruction_print_warning(recipe, tmp_path, capsys):
    write_dataset(tmp_path / "set")
    tasks = tmp_path / "set" / "meta" / "tasks.parquet"
    table = pq.read_table(tasks)
    column = table.column_names.index("task")
    pq.write_table(table.set_column(column, "task", pa.array(["  ", table["task"][1].as_py()])), tasks)
    recipe = recipe.replace(dataset=str(tmp_path / "set"), num_steps=1, holdout=0.0)
    warned = "warning: 12 of these frames have no instruction"
    loop.train(recipe, tmp_path / "run")
    assert warned in capsys.readouterr().err
    loop.train(recipe.replace(prompt="open it"), tmp_path / "told")
    assert warned not in capsys.readouterr().err


def test_short_video_raises_error_before_anything_is_written(recipe, tmp_path):
    write_dataset(tmp_path / "set", video=True)
    for video in (tmp_path / "set").rglob("*.mp4"):
        encode_video(video, [np.zeros((32, 32, 3), np.uint8)] * 23, fps=80, encoder=default_encoder())
    with pytest.raises(
        ValueError, match=r"has 23 frames .* its 4 episodes 24, .*leave the episodes of this video, 0 to 3, out"
    ):
        loop.train(recipe.replace(dataset=str(tmp_path / "set")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(whole_run, recipe):
    with pytest.raises(ValueError, match="--resume"):
        loop.train(recipe, whole_run[0])


def test_resuming_without_a_run_raises_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no run to resume"):
        resume_config(tmp_path)


def test_run_without_a_checkpoint_restarts(whole_run, recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.json").write_text(recipe.to_json())
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert loop.train(resume_config(run), run, resume=True).step == 6
    assert_same_bits(weights(run), weights(whole_run[0]))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 2


def test_damaged_checkpoint_raises_error(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=3, save_every=2), run)
    before, last = state.checkpoints(run)
    (file,) = (last / state.STATE).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"can't be loaded: .*Move the checkpoint {last} .*continues from {before}"):
        loop.train(resume_config(run), run, resume=True)
    shutil.rmtree(last)
    assert loop.train(resume_config(run), run, resume=True).step == 3
    shutil.rmtree(before)
    (file,) = (last / state.STATE).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="--resume then starts at the first step: there is no older checkpoint"):
        loop.train(resume_config(run), run, resume=True)


@pytest.mark.slow
def test_error_in_a_worker_process_prints_one_line(recipe, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "set")
    file = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    key = "observation.images.base"
    images = table.column(key).to_pylist()
    for i in range(1, len(images)):  # opening the dataset reads the first frame
        images[i]["bytes"] = images[i]["bytes"][:100]
    pq.write_table(table.set_column(table.column_names.index(key), key, pa.array(images, table[key].type)), file)
    config = recipe.replace(dataset=str(tmp_path / "set"), workers=1, holdout=0.0)
    (tmp_path / "recipe.json").write_text(config.to_json())
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert re.search(r"^error: observation\.images\.base of episode \d, frame \d can't be read: .*damaged", shown, re.M)
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not|Expecting"),
        ("[]", "Expected `object`"),
        ('{"steps": 3}', "unknown fields steps"),
        ('{"augmentation": {"blur": 1}}', r"unknown fields data\.augmentation\.blur"),
        ('{"batch_size": 0}', "batch_size"),
        ('{"learning_rate": 1, "optim": {"lr": 2}}', r"has both learning_rate and optim\.lr, the same option"),
        ('{"optim": {"lr": 2}, "lr": 1}', r"has both optim\.lr and lr, the same option"),
        ('{"trained": "all", "finetune": "full"}', "has both trained and finetune, the same option"),
        ('{"optim": {"learning_rate": 1}}', r"optim\.learning_rate is now optim\.lr"),
        ('{"optim": {"accumulate": 2}}', r"optim\.accumulate is now grad_accum_steps"),
        ('{"model": {"finetune": "all"}}', r"model\.finetune 'all' is now 'full'"),
        (
            '{"model": {"activation_checkpointing": "layers"}}',
            r"model\.activation_checkpointing 'layers' is now 'full'",
        ),
    ],
)
def test_wrong_recipe_file_raises_error(text, message, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(file)


def test_python_recipe_as_file_raises_error_with_the_command(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("RECIPE = None\n")
    with pytest.raises(ValueError, match=r"A Python recipe is run: python .*recipe\.py"):
        TrainConfig.from_json(file)


def test_unknown_option_raises_error_with_suggestion(recipe):
    with pytest.raises(TrainingError, match=r"no option learning_rat; did you mean lr\?"):
        TrainConfig(learning_rat=3)
    with pytest.raises(TrainingError, match=r"no option warmup_step; did you mean warmup_steps\?"):
        recipe.replace(warmup_step=3)
    with pytest.raises(TrainingError, match=r"no option ema_deca; did you mean ema_decay\?"):
        TrainConfig(optim={"ema_deca": 0.0})
    with pytest.raises(TrainingError, match="no option xyz; torchpi train --help lists all"):
        TrainConfig(xyz=3)


def test_recipe_survives_json_round_trip(recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert TrainConfig.from_json(tmp_path / "recipe.json") == recipe


def test_flat_options_and_old_names_are_read_into_groups(tmp_path):
    file = tmp_path / "recipe.json"
    flat = {"learning_rate": 1, "model": "tiny", "trained": "all", "parallel": "fsdp", "eval": {"env": "metaworld"}}
    file.write_text(json.dumps(flat))
    expected = TrainConfig(
        model=ModelConfig(config="tiny", finetune="full"),
        optim=OptimConfig(lr=1.0),
        parallel=ParallelConfig("fsdp"),
        eval=EvalConfig(env="metaworld"),
    )
    assert TrainConfig.from_json(file) == expected
    assert TrainConfig(lr=1.0, model="tiny", parallel="fsdp", env="metaworld") == expected


def test_replace_changes_options_and_keeps_the_rest():
    config = TrainConfig(init="pi05_base", lr=1e-3)
    changed = config.replace(model="tiny", num_steps=3)
    assert (changed.model.init, changed.model.config, changed.optim.lr) == ("pi05_base", "tiny", 1e-3)
    assert changed.options == {**config.options, "model": "tiny", "num_steps": 3}


def test_metaworld_robot_fits_its_dataset(dataset):
    assert metaworld().action_size == LeRobotDataset(dataset, action_horizon=2)[0]["action"].shape[1]


def run_command(*arguments: str) -> int:
    try:
        main(["train", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_recipe_sets_the_defaults_of_the_options(capsys):
    assert run_command("--recipe", "metaworld", "--help") == 0
    assert "(default: 5400)" in " ".join(capsys.readouterr().out.split())
    assert run_command("--recipe", "nowhere") == 1
    assert "packaged recipes are libero, metaworld" in capsys.readouterr().err


def test_missing_or_contradicting_options_raise_error(whole_run, capsys):
    for arguments, message in (
        ([], "train needs --out"),
        (["--out", "x"], "train needs --dataset"),
        (["--out", "x", "--dataset", "y"], "train needs --embodiment"),
        (["--resume", str(whole_run[0]), "--out", "x"], "omit --out and --recipe"),
        (["--resume", str(whole_run[0]), "--num-steps", "3"], "has 6 steps already"),
        (["--resume", str(whole_run[0]), "--seed", "3"], "seed was 0, now 3"),
        (["--out", "x", "--dataset", "nowhere", "--embodiment", "metaworld", "--model", "tiny"], "nowhere"),
        (["--batch-size", "0"], "batch_size must be `int` >= 1"),
    ):
        assert run_command(*arguments) != 0
        captured = capsys.readouterr()
        assert message in " ".join((captured.err + captured.out).split()), arguments


def test_command_resumes_and_prints_the_path_of_the_policy(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(recipe.replace(num_steps=3), run)
    begun = " ".join(capsys.readouterr().err.split())
    assert "weights: random; 0 arrays loaded" in begun
    assert "4 samples × 2 flow samples, in 1 process" in begun
    assert "1 more is held out" in begun
    assert run_command("--resume", str(run)) == 0
    shown = capsys.readouterr()
    assert f"policy: {run}/checkpoints/00000003/policy" in shown.out
    assert "weights: checkpoint at step 3\n" in shown.err
    assert "random" not in shown.err
