"""Statistics of a dataset, compared with those of frames that the embodiment converts one by one."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from torchpi.cli import main
from torchpi.cli.stats import checkpoint_stats
from torchpi.data import LeRobotDataset, LeRobotWriter, compute_norm_stats, to_observation
from torchpi.data.stats import distributions, stats_coverage
from torchpi.robots import Embodiment, aloha, droid, get_embodiment, libero, metaworld
from torchpi.transforms import NormStats, load_norm_stats, save_norm_stats
from torchpi.transforms.normalize import narrow_dims
from torchpi.ui.tables import Column, Table

H = 6


def some_set(lengths, s, a, *, change=lambda state, actions: None):
    """A stand-in for a dataset, with what statistics need."""
    rng = np.random.default_rng(len(lengths))
    state = rng.normal(size=(sum(lengths), s)).astype(np.float32)
    actions = rng.normal(size=(sum(lengths), a)).astype(np.float32)
    change(state, actions)
    columns = {"observation.state": state, "action": actions}
    dataset = object.__new__(LeRobotDataset)
    vars(dataset).update(columns=columns, episode_lengths=tuple(lengths), path="some_set", state_names=None)
    dataset.action_names = None
    return dataset


def frame_by_frame(dataset, embodiment):
    """Every state, and every unpadded action of every chunk, in the model's units."""
    image = np.zeros((2, 2, 3), np.uint8)
    names = [camera.key for camera in embodiment.read_cameras if camera.key]
    cameras = {f"observation.images.{name.replace('/', '.').split('.')[-1]}": image for name in names}
    states, actions, first = [], [], 0
    for length in dataset.episode_lengths:
        for i in range(first, first + length):
            frame = {
                **cameras,
                "observation.state": dataset.columns["observation.state"][i],
                "action": dataset.columns["action"][i : min(i + H, first + length)],
                "task": "t",
            }
            sample = embodiment.to_model(to_observation(frame, embodiment))
            states.append(sample["state"])
            actions.append(sample["actions"])
        first += length
    return {"state": np.stack(states).astype(np.float64), "actions": np.concatenate(actions).astype(np.float64)}


ROBOTS = {
    "absolute": (metaworld(), 4, 4),
    "several parts": (droid(), 8, 8),
    "short state": (libero(), 7, 7),
    "deltas": (libero(delta_actions=True), 8, 7),
    "deltas of a hook": (aloha(), 14, 14),
}


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("lengths", [(9, 1, 20, 5), (1,), (3, 3, 3)])
@pytest.mark.filterwarnings("ignore:In some_set, the .* never change")
def test_statistics_equal_those_computed_frame_by_frame(robot, lengths):
    embodiment, s, a = ROBOTS[robot]
    dataset = some_set(lengths, s, a)
    stats = compute_norm_stats(dataset, embodiment, action_horizon=H)
    limits = distributions(dataset, embodiment, action_horizon=H)
    for what, values in frame_by_frame(dataset, embodiment).items():
        expected = {
            "mean": values.mean(axis=0),
            "std": values.std(axis=0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
        for name, array in expected.items():
            np.testing.assert_allclose(
                getattr(stats[what], name), array, rtol=1e-12, atol=1e-12, err_msg=f"{what} {name}"
            )
        assert np.array_equal(limits[what].min, values.min(axis=0))
        assert np.array_equal(limits[what].max, values.max(axis=0))


@pytest.mark.filterwarnings("ignore:.* never change:UserWarning")  # the gripper's command, in one episode
def test_only_selected_episodes_count(golden_root):
    root = golden_root / "datasets/lerobot_v3_video"
    stats = compute_norm_stats(LeRobotDataset(root, action_horizon=1), metaworld(), action_horizon=4)
    part = LeRobotDataset(root, action_horizon=1, episodes=[2])
    values = part.columns["observation.state"].astype(np.float64)
    np.testing.assert_allclose(
        compute_norm_stats(part, metaworld(), action_horizon=4)["state"].mean, values.mean(axis=0), rtol=1e-12
    )
    assert not np.allclose(stats["state"].mean, values.mean(axis=0))


def test_dataset_of_another_robot_is_an_error():
    with pytest.raises(ValueError, match=r"observation\.state has 5 dimensions; embodiment 'metaworld' has 4"):
        compute_norm_stats(some_set((3,), 5, 4), metaworld(), action_horizon=H)
    with pytest.raises(ValueError, match=r"action has 7 dimensions; embodiment 'metaworld' has 4"):
        compute_norm_stats(some_set((3,), 4, 7), metaworld(), action_horizon=H)


def test_nan_is_an_error():
    def change(state, actions):
        actions[1, 2] = np.nan

    with pytest.raises(ValueError, match=r"NaN or infinity in action of some_set, dimension 2 \(delta_z\)"):
        compute_norm_stats(some_set((3,), 4, 4, change=change), metaworld(), action_horizon=H)


def test_constant_dimensions_are_named_in_a_warning():
    def change(state, actions):
        state[:, 3] = 0.3  # the mean of float32 0.3 in float64 is not 0.3
        actions[:, 3] = 0.1

    dataset = some_set((40, 30), 4, 4, change=change)
    with pytest.warns(
        UserWarning, match=r"In some_set, the (state|actions) gripper never change.*divided by 1e-6"
    ) as seen:
        stats = compute_norm_stats(dataset, metaworld(), action_horizon=H)
    assert len(seen) == 2
    assert stats["state"].std[3] == 0
    assert stats["state"].q01[3] == stats["state"].q99[3] == np.float32(0.3)


def hard(values):
    array = np.asarray(values, np.float64)[:, None]
    stats = NormStats(array.mean(0), array.std(0), np.quantile(array, 0.01, axis=0), np.quantile(array, 0.99, axis=0))
    return narrow_dims(stats, ["gripper"])


def test_narrow_dimensions_are_named():
    rng = np.random.default_rng(0)
    assert hard(rng.normal(size=1000)) == []
    assert hard(np.repeat([0.0, 1.0], 500)) == []
    assert hard(np.r_[np.zeros(950), np.ones(50)]) == []  # rare, but often enough for q99
    assert "gripper never changes (it is 0.5)" in hard(np.full(1000, 0.5))[0]
    assert "never changes" in hard(np.float32(1) + rng.normal(size=1000) * 1e-8)[0]  # rounding
    (message,) = hard(np.r_[np.zeros(995), np.ones(5)])
    assert "gripper is 0 in 98 % of the frames (q01 = q99)" in message
    assert "z_score" in message
    (message,) = hard(np.r_[rng.normal(size=995) * 1e-5, np.full(5, 10.0)])
    assert "gripper hardly moves: 98 % of its values are within" in message
    assert narrow_dims(NormStats(np.zeros(2), np.array([0, 1.0])), ["a", "b"])[0].startswith("a never changes")


# Compared with a checkpoint's statistics


def padded(stats, dims):
    return NormStats(
        *(np.pad(values, (0, dims - stats.dim)) for values in (stats.mean, stats.std, stats.q01, stats.q99))
    )


@pytest.mark.parametrize("robot", ROBOTS)
def test_coverage_equals_counting_frame_by_frame(robot):
    embodiment, s, a = ROBOTS[robot]
    dataset = some_set((9, 1, 20, 5), s, a)
    other = compute_norm_stats(some_set((30, 40), s, a), embodiment, action_horizon=H)
    (coverage,) = stats_coverage(dataset, embodiment, {"other": other}, action_horizon=H)
    assert coverage.comparable
    for what, values in frame_by_frame(dataset, embodiment).items():
        inside = (values >= other[what].q01) & (values <= other[what].q99)
        assert getattr(coverage, what).inside == pytest.approx(inside.mean(axis=0).tolist())
        assert getattr(coverage, what).overall == pytest.approx(inside.mean())


def test_robots_are_sorted_by_coverage():
    dataset = some_set((300, 200), 4, 4)
    own = compute_norm_stats(dataset, metaworld(), action_horizon=H)
    far = {what: NormStats(s.mean + 9, s.std, s.q01 + 9, s.q99 + 9) for what, s in own.items()}
    narrower = {what: NormStats(s.mean[:3], s.std[:3], s.q01[:3], s.q99[:3]) for what, s in own.items()}
    wider = {what: NormStats(*(np.append(v, 1.0) for v in (s.mean, s.std, s.q01, s.q99))) for what, s in own.items()}
    robots = {
        "far": far,
        "narrower": narrower,
        "wider": wider,
        "padded": {what: padded(s, 32) for what, s in own.items()},
        "state only": {"state": own["state"]},
        "no quantiles": {what: NormStats(s.mean, s.std) for what, s in own.items()},
    }
    found = {entry.name: entry for entry in stats_coverage(dataset, metaworld(), robots, action_horizon=H)}
    assert list(found)[:3] in (["padded", "no quantiles", "far"], ["no quantiles", "padded", "far"])
    assert found["padded"].overall == pytest.approx(0.98, abs=0.005)
    assert found["no quantiles"].overall == pytest.approx(0.98, abs=0.01)
    assert found["no quantiles"].state.range == "mean ± 2.326 std"
    assert found["far"].overall == 0
    for name, dims in (("narrower", 3), ("wider", 5)):
        key = found[name].state
        assert not found[name].comparable
        assert (key.dims, key.checkpoint_dims, len(key.inside)) == (4, dims, min(4, dims))
    assert not found["state only"].comparable
    with pytest.raises(ValueError, match="statistics of hand have neither state nor actions, but velocity"):
        stats_coverage(dataset, metaworld(), {"hand": {"velocity": own["state"]}}, action_horizon=H)


def test_checkpoint_stats_are_found_in_every_layout(golden_root, tmp_path):
    stats = NormStats(np.zeros(2), np.ones(2))
    for name in ("trossen", "lab/arm"):
        folder = tmp_path / "checkpoint" / "assets" / name
        folder.mkdir(parents=True)
        save_norm_stats(folder, {"state": stats})
    (tmp_path / "checkpoint/params").mkdir()
    assert list(checkpoint_stats(tmp_path / "checkpoint")) == ["lab/arm", "trossen"]
    assert list(checkpoint_stats(tmp_path / "checkpoint/assets")) == ["lab/arm", "trossen"]
    assert list(checkpoint_stats(tmp_path / "checkpoint/assets/trossen")) == ["trossen"]
    assert set(checkpoint_stats("demo")["demo_policy"]) == {"state", "actions"}
    assert set(checkpoint_stats(golden_root / "pi05/lerobot")["lerobot"]) == {"state", "actions"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no statistics; expected norm_stats\.json, assets/"):
        checkpoint_stats(tmp_path / "empty")


# The command


def run(capsys, *arguments):
    main(["stats", *map(str, arguments)])
    return capsys.readouterr()


def test_command_prints_json(golden_root, tmp_path, capsys):
    root, out = golden_root / "datasets/lerobot_v3_video", tmp_path / "new" / "stats.json"
    shown = run(capsys, root, "--embodiment", "metaworld", "--action-horizon", "4", "--out", out, "--json")
    document = json.loads(shown.out)
    assert (document["episodes"], document["frames"], document["action_horizon"]) == (3, 36, 4)
    assert document["actions"]["names"] == ["delta_x", "delta_y", "delta_z", "gripper"]
    expected = compute_norm_stats(LeRobotDataset(root, action_horizon=1), metaworld(), action_horizon=4)
    loaded = load_norm_stats(out)
    for what, stats in expected.items():
        for name in ("mean", "std", "q01", "q99"):
            assert np.array_equal(getattr(loaded[what], name), getattr(stats, name))
            assert document[what][name] == getattr(stats, name).tolist()
    assert set(json.loads(out.read_text())["norm_stats"]["state"]) == {"mean", "std", "q01", "q99"}  # openpi's
    assert document["warnings"] == []
    assert (document["idle_frames"], document["idle_share"], document["compare"]) == (0, 0.0, None)


@pytest.mark.filterwarnings("ignore")
def test_command_compares_with_a_checkpoint(golden_root, capsys):
    root = golden_root / "datasets/lerobot_v3_video"
    arguments = (root, "--embodiment", "metaworld", "--compare", "demo", "--episodes", "0,2")
    document = json.loads(run(capsys, *arguments, "--json").out)
    assert document["episodes"] == 2
    (coverage,) = document["compare"]
    assert coverage["name"] == "demo_policy"
    assert coverage["comparable"]
    assert len(coverage["state"]["inside"]) == 4
    assert 0 <= coverage["overall"] <= 1
    assert "fraction inside [q01, q99] of demo" in run(capsys, *arguments).out


def test_command_reads_neither_images_nor_other_columns(golden_root, tmp_path, capsys, monkeypatch):
    root = tmp_path / "set"
    shutil.copytree(golden_root / "datasets/lerobot_v3_image", root)
    columns = []
    read = pq.ParquetFile.iter_batches

    def reading(file, **options):
        columns.append(options["columns"])
        return read(file, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", reading)
    run(capsys, root, "--embodiment", "metaworld", "--json")
    (of_data,) = [names for names in columns if names and "action" in names]
    assert set(of_data) == {
        "observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index"
    }  # fmt: skip
    shutil.rmtree(tmp_path / "set")
    shutil.copytree(golden_root / "datasets/lerobot_v21", root)
    shutil.rmtree(root / "videos")
    assert json.loads(run(capsys, root, "--embodiment", "metaworld", "--json").out)["frames"] > 0


def test_command_prints_tables_and_warnings(tmp_path, capsys):
    """A gripper that moves in few frames, and a state that never changes."""
    rng = np.random.default_rng(0)
    embodiment = Embodiment.generic(
        "arm", cameras={"base_0_rgb": "front"}, state=("x", "fixed"), actions=("dx", "grip")
    )
    (tmp_path / "arm.json").write_text(json.dumps(embodiment.to_dict()))
    with LeRobotWriter(
        tmp_path / "set", fps=10, cameras={"front": (4, 4, 3)}, state_names=["x", "fixed"], action_names=["dx", "grip"]
    ) as writer:
        actions = rng.normal(size=(200, 2))
        actions[:, 1] = 0
        actions[100, 1] = 1
        state = np.stack([rng.normal(size=200), np.full(200, 0.7)], axis=1)
        frames = {"observation.images.front": np.zeros((200, 4, 4, 3), np.uint8)}
        writer.add_episode({**frames, "observation.state": state, "action": actions}, "t")
    shown = run(capsys, tmp_path / "set", "--embodiment", tmp_path / "arm.json", "--action-horizon", "2")
    for text in ("1 episode, 200 frames", "mean", "q99", "dx", "grip"):
        assert text in shown.out
    assert "warning: state: fixed never changes (it is 0.7)" in shown.err
    assert "warning: actions: grip is 0 in 98 % of the frames" in shown.err
    assert not (tmp_path / "norm_stats.json").exists()


@pytest.mark.parametrize(
    ("name", "embodiment", "message"),
    [("nothing", "metaworld", "no folder"), ("lerobot_v21", "droid", "droid"), ("lerobot_v21", "r2d2", "Unknown")],
)
def test_command_reports_errors(name, embodiment, message, golden_root, capsys):
    with pytest.raises(SystemExit):
        main(["stats", str(golden_root / "datasets" / name), "--embodiment", embodiment, "--json"])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


def test_every_registered_robot_has_statistics():
    for name in ("metaworld", "aloha", "droid", "libero"):
        embodiment = get_embodiment(name)
        dataset = some_set((30, 20), len(embodiment.state_names), embodiment.action_size)
        assert compute_norm_stats(dataset, embodiment, action_horizon=50)["actions"].dim == embodiment.action_size


def test_tables_have_units_and_deltas(tmp_path, capsys, golden_root):
    dimensions = ["x", "y", "z", "gripper"]
    robot = Embodiment.generic(
        "arm", cameras={"base_0_rgb": "base"}, state=dimensions, actions=dimensions, delta=["x"], control_hz=80
    ).to_dict()
    robot["state"][0]["units"] = ["m", "m", "m", "0 to 1"]
    robot["actions"][0]["unit"] = "m"
    (tmp_path / "arm.json").write_text(json.dumps(robot))
    data = tmp_path / "set"
    shutil.copytree(golden_root / "datasets" / "lerobot_v3_image", data)
    info = json.loads((data / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = dimensions
    (data / "meta" / "info.json").write_text(json.dumps(info))
    main(["stats", str(data), "--embodiment", str(tmp_path / "arm.json"), "--action-horizon", "4"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("gripper 0 to 1 ")]
    assert [line for line in lines if line.startswith("x m, delta ")]


@pytest.mark.parametrize("width", [40, 80])
def test_numbers_and_names_are_not_cut_on_a_narrow_terminal(width):
    columns = [Column("state", "name"), Column("unit"), *(Column(title, "number") for title in ("q01", "q99"))]
    table = Table(columns, [("shoulder_pan.pos", "-100 to 100 of the calibrated range", "-103.8", "-0.0475")])
    console = Console(file=io.StringIO(), width=width)
    console.print(table.to_rich(), crop=False)
    assert {"shoulder_pan.pos", "-103.8", "-0.0475"} <= set(console.file.getvalue().split())
