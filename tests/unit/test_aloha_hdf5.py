"""Conversion of ALOHA's HDF5 episodes to a LeRobot dataset."""

import importlib.util
import io
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from torchpi.data import LeRobotDataset, to_observation
from torchpi.robots import get_embodiment

h5py = pytest.importorskip("h5py")

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "aloha_hdf5_to_lerobot.py"
CAMERAS = ("cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("aloha_hdf5_to_lerobot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def smooth_images(rng, num_frames, height=24, width=32):
    """Images that JPEG and video hardly change."""
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    colours = rng.uniform(0, 120, (num_frames, 1, 1, 3))
    return (colours + 60 * rows + 60 * columns).astype(np.uint8)


def write_episode(path, *, num_frames=5, compressed=False, seed=0, cameras=CAMERAS):
    """Write an episode like ALOHA's recording script, and return its images."""
    rng = np.random.default_rng(seed)
    images = {name: smooth_images(rng, num_frames) for name in cameras}
    with h5py.File(path, "w") as file:
        file["observations/qpos"] = rng.uniform(0, 1, (num_frames, 14))
        file["observations/qvel"] = rng.uniform(0, 1, (num_frames, 14))
        file["action"] = rng.uniform(0, 1, (num_frames, 14))
        for name, values in images.items():
            file[f"observations/images/{name}"] = padded_jpegs(values) if compressed else values
        if compressed:
            file["compress_len"] = np.full((len(cameras), num_frames), 1000.0)
    return images


def padded_jpegs(images):
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    longest = max(map(len, files)) + 50
    return np.stack([np.frombuffer(file.ljust(longest, b"\0"), np.uint8) for file in files])


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "jpeg"])
@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
def test_converted_episodes_are_read_as_aloha(compressed, video, script, tmp_path):
    (tmp_path / "in").mkdir()
    numbers = (0, 2, 10)  # by number, not by name
    images = [
        write_episode(tmp_path / f"in/episode_{n}.hdf5", num_frames=3 + n, compressed=compressed, seed=n)
        for n in numbers
    ]
    assert script.convert(tmp_path / "in", tmp_path / "out", task="fold the towel", video=video) == 3
    dataset = LeRobotDataset(tmp_path / "out", action_horizon=4)
    assert dataset.episode_lengths == (3, 5, 13)
    assert (dataset.fps, dataset.robot_type) == (50, "aloha")
    assert dataset.action_names == dataset.state_names == get_embodiment("aloha").state_names
    tolerance = 0 if not (compressed or video) else 8
    for episode, first in enumerate((0, 3, 8)):
        with h5py.File(tmp_path / f"in/episode_{numbers[episode]}.hdf5") as file:
            item = dataset[first + 2]
            assert np.array_equal(item["observation.state"], file["observations/qpos"][2].astype(np.float32))
            assert np.array_equal(item["action"][0], file["action"][2].astype(np.float32))
        for name in CAMERAS:
            difference = item[f"observation.images.{name}"].astype(int) - images[episode][name][2]
            assert np.abs(difference).max() <= tolerance
    aloha = get_embodiment("aloha")
    sample = aloha.to_model(to_observation(dataset[0], aloha))
    assert sample["prompt"] == "fold the towel"
    assert sample["actions"].shape == (4, 14)
    assert all(sample["image_mask"].values())


def test_command_converts_a_folder(script, tmp_path, capsys, monkeypatch):
    write_episode(tmp_path / "episode_0.hdf5")
    monkeypatch.setattr(sys, "argv", ["aloha", str(tmp_path), str(tmp_path / "out"), "--task", "t", "--no-video"])
    import tyro

    tyro.cli(script.main)
    shown = capsys.readouterr()
    assert "1 episode, written to" in shown.out
    assert "converting" in shown.err
    with pytest.raises(SystemExit, match=r"error: .*out exists already and is not an empty folder"):
        tyro.cli(script.main)


def refused(script, folder, match, error=ValueError):
    with pytest.raises(error, match=match):
        script.convert(folder, folder / "out", task="t", video=False)
    assert not (folder / "out" / "meta").exists()


def test_folder_without_episodes_is_an_error(script, tmp_path):
    refused(script, tmp_path, r"has no episode_\*\.hdf5; expected the folder of an ALOHA recording", FileNotFoundError)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.pop("action"), r"episode_1\.hdf5 has no action; it has observations, .*observations/qpos"),
        (lambda f: f.pop("observations/images"), "has no observations/images"),
        (lambda f: [f.pop(f"observations/images/{c}") for c in CAMERAS], "has no cameras in observations/images"),
        (lambda f: f.pop("observations/images/cam_low"), "has the cameras cam_high 24x32, .* expected the same in all"),
        (lambda f: replace(f, "action", np.zeros((4, 14))), "has frames .*'action': 4.*expected equal lengths"),
        (lambda f: replace(f, "action", np.zeros((5, 7))), r"action is \[5, 7\]; expected \[T, 14\]"),
        (lambda f: replace(f, "observations/images/cam_low", np.zeros((5, 24, 32))), r"cam_low is float64 \[24, 32\]"),
        (lambda f: replace(f, "observations/images/cam_low", np.ones((5, 99), np.uint8)), "JPEG of cam_low in frame 0"),
    ],
)
def test_episode_that_differs_from_the_first_is_an_error(damage, message, script, tmp_path):
    for n in range(2):
        write_episode(tmp_path / f"episode_{n}.hdf5", seed=n)
    with h5py.File(tmp_path / "episode_1.hdf5", "r+") as file:
        damage(file)
    refused(script, tmp_path, message)


def replace(file, key, values):
    del file[key]
    file[key] = values


def test_truncated_file_is_an_error(script, tmp_path):
    write_episode(tmp_path / "episode_0.hdf5")
    content = (tmp_path / "episode_0.hdf5").read_bytes()
    (tmp_path / "episode_0.hdf5").write_bytes(content[: len(content) // 2])
    refused(script, tmp_path, r"episode_0\.hdf5 is truncated or not an HDF5 file")


def test_damaged_image_stops_the_conversion_and_keeps_earlier_episodes(script, tmp_path):
    """Only later episodes are affected by the error."""
    write_episode(tmp_path / "episode_0.hdf5")
    write_episode(tmp_path / "episode_1.hdf5", compressed=True)
    with h5py.File(tmp_path / "episode_1.hdf5", "r+") as file:
        file["observations/images/cam_high"][3, 200:] = 0
    with pytest.raises(ValueError, match=r"episode_1\.hdf5: the JPEG of cam_high in frame 3 is damaged"):
        script.convert(tmp_path, tmp_path / "out", task="t", video=False)
    assert LeRobotDataset(tmp_path / "out", action_horizon=1).episode_lengths == (5,)


def test_missing_extra_is_an_error_with_the_install_command(script, tmp_path, monkeypatch):
    (tmp_path / "episode_0.hdf5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(script, tmp_path, r"HDF5 needs the extra 'hdf5': pip install 'torchpi\[hdf5\]'", ModuleNotFoundError)
