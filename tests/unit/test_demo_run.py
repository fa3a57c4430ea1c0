"""`torchpi demo` with and without a renderer."""

import pathlib
import shutil
import subprocess
import types
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sim_helpers import (
    corridor,  # noqa: F401
    python,
    random_policy,
    require_simulator,
)
from test_demo import check_page

from torchpi.cli import main
from torchpi.demo import demo_tasks
from torchpi.demo import run as demo_run
from torchpi.demo.page import Demo
from torchpi.demo.replay import log_episodes
from torchpi.demo.run import run_demo
from torchpi.policy import Policy
from torchpi.sim.evaluate import evaluate
from torchpi.sim.rollout import Rollout


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a small random policy of two tasks, faucet-open and faucet-close."""
    path = tmp_path_factory.mktemp("policy") / "random"
    random_policy().save(path)
    return path


@pytest.fixture
def no_renderer(monkeypatch):
    monkeypatch.setattr(demo_run, "rendering_problem", lambda: "no OpenGL (broken). Install it")


@pytest.fixture
def prompts(monkeypatch):
    """Prompts of all requests to policies of this process."""
    prompts, infer = [], Policy.infer

    def spy(self, observation, **options):
        prompts.append(observation["prompt"])
        return infer(self, observation, **options)

    monkeypatch.setattr(Policy, "infer", spy)
    return prompts


# Without a renderer


def test_demo_without_a_renderer_uses_packaged_frames(no_renderer, tmp_path, capsys):
    main(["demo", "--out", str(tmp_path / "new" / "demo")])
    captured = capsys.readouterr()
    printed = " ".join(captured.out.split())
    assert captured.err == ""
    assert (
        "Nothing can be rendered here, so there are no episodes and no videos: no OpenGL (broken). Install it"
        in printed
    )
    for part in (
        "π₀.₅",
        "images",
        "prefix",
        "Euler steps",
        "action by action",
        "Try next",
        "trace demo",
        *demo_tasks(),
    ):
        assert part in printed
    page = tmp_path / "new" / "demo" / "index.html"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    check_page(page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_command_succeeds_without_opengl_or_without_the_simulator(tmp_path):
    """Each in another process, because MuJoCo chooses its backend only once."""
    arguments = ["-m", "torchpi.cli", "demo", "--tasks", "faucet-open", "--out", tmp_path]
    done = python(*arguments, MUJOCO_GL="disable")
    assert done.returncode == 0
    assert "apt-get install libegl1 libgl1-mesa-dri libopengl0" in " ".join(done.stdout.split())
    assert "15 " in done.stdout  # the last action
    blocked = "import sys\nfor name in ('av', 'metaworld', 'mujoco', 'pyarrow'): sys.modules[name] = None\n"
    program = f"{blocked}from torchpi.cli import main; main(['demo', '--out', {str(tmp_path)!r}])"
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "pip install 'torchpi[sim]'" in " ".join(done.stdout.split())


def test_instruction_reaches_the_policy_without_a_renderer(no_renderer, prompts, policy, tmp_path, capsys):
    demo = run_demo(tmp_path, policy=policy, instruction="wave")
    assert prompts == ["wave"]
    assert list(demo.frames) == ["faucet-open"]  # the first task
    assert "'Task: wave, State:" in " ".join(capsys.readouterr().out.split())
    assert "“wave”" in (tmp_path / "index.html").read_text(encoding="utf-8")


# With one


def test_demo_writes_videos_table_and_page(policy, prompts, tmp_path, capsys):
    require_simulator()
    demo = run_demo(
        tmp_path,
        policy=policy,
        tasks=["faucet-close"],
        instruction="wave",
        episodes=2,
        workers=1,
        rollout=Rollout(max_steps=12),
    )
    assert demo.problem is None
    assert len(prompts) >= 4
    assert set(prompts) == {"wave"}
    assert [(episode.task, episode.steps) for episode in demo.evaluation.episodes] == [("faucet-close", 12)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faucet-close_0.mp4", "index.html"]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    check_page(page, files=["faucet-close_0.mp4"])
    assert "data:video/mp4;base64," in page
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "faucet-close",
        "wave",
        "95 % interval",
        "index.html",
        "sim record",
        "train --recipe metaworld",
    ):
        assert part in printed or part in page


def test_traced_request_equals_the_first_request_of_the_video(policy, tmp_path, monkeypatch):
    """The packaged frames are the first observation of the first episode, and the noise is the same."""
    require_simulator()
    chunks, infer = [], Policy.infer
    monkeypatch.setattr(Policy, "infer", lambda *args, **options: chunks.append(infer(*args, **options)) or chunks[-1])
    demo = run_demo(
        tmp_path, policy=policy, tasks=["faucet-open"], episodes=1, workers=1, rollout=Rollout(max_steps=1)
    )  # fmt: skip
    assert demo.task == "faucet-open"
    np.testing.assert_allclose(demo.flow.actions, chunks[0]["actions"], rtol=0, atol=0.05)


@pytest.mark.slow
def test_demo_of_the_embedded_policy(tmp_path, capsys):
    """With all of its tasks, and the default number of processes."""
    require_simulator()
    main(["demo", "--episodes", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["index.html", *(f"{task}_0.mp4" for task in demo_tasks())]
    )
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    check_page(page, files=[f"{task}_0.mp4" for task in demo_tasks()])
    assert all(task in capsys.readouterr().out or task in page for task in demo_tasks())


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_renders_the_page(policy, tmp_path, width):
    require_simulator()
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium")
    run_demo(tmp_path, policy=policy, tasks=["faucet-open"], episodes=1, workers=1, rollout=Rollout(max_steps=24))
    screenshot = tmp_path / "page.png"
    arguments = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000", f"--window-size={width},1600",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={screenshot}", (tmp_path / "index.html").as_uri(),
    ]  # fmt: skip
    subprocess.run([chromium, *arguments], check=True, capture_output=True, timeout=120)
    with Image.open(screenshot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # the video is in it


def test_rerun_log_repeats_the_episodes_of_the_demo(corridor, monkeypatch):  # noqa: F811
    """With the same instruction and settings, to the bit."""
    requests, prompts, infer, policy = [], [], Policy.infer, random_policy()

    def spy(self, observation, **options):
        result = infer(self, observation, **options)
        threads = torch.get_num_threads()
        requests.append((observation["prompt"], options["num_steps"], threads, result["actions"].tolist()))
        return result

    monkeypatch.setattr(Policy, "infer", spy)
    options = {"instructions": {"short": "wave"}, "rollout": Rollout(3, num_steps=1, max_steps=7)}
    evaluation = evaluate(policy, "corridor", tasks=["short"], episodes=1, progress=False, **options)
    robot_log = types.SimpleNamespace(
        observe=lambda now, observation: prompts.append(observation["prompt"]),
        predict=lambda *_: None,
        execute=lambda *_: None,
    )
    evaluated, requests[:] = [*requests], []
    demo = mock.Mock(spec=Demo, policy=policy, evaluation=evaluation)
    log_episodes(demo, types.SimpleNamespace(robot=lambda metadata: robot_log))
    assert requests == evaluated
    assert len(evaluated) == evaluation.episodes[0].num_chunks
    assert set(prompts) == {"wave"}


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "at least one episode per task, got 0"),
        (["--tasks", "fly"], "metaworld has no task 'fly'"),
        (
            ["--tasks", "faucet-open,door-open", "--instruction", "go"],
            "An instruction is for one task, got faucet-open,",
        ),
        (["--out", "FILE"], "is a file, or below one; expected a folder to write into. Choose another one with --out"),
    ],
)
def test_command_prints_one_line_for_an_invalid_argument(
    no_renderer, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("FILE").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
