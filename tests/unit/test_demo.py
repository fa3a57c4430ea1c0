"""The demo: packaged frames, data flow, provenance, and page."""

import dataclasses
import html.parser
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest
import safetensors
import torch
from sim_helpers import random_policy

import torchpi
from torchpi.cli import COMMANDS
from torchpi.demo import demo_observation, demo_tasks
from torchpi.demo import page as demo_page
from torchpi.demo.flow import describe_flow, trace_request
from torchpi.demo.next_steps import next_steps
from torchpi.demo.page import Demo, render_demo
from torchpi.inspect.provenance import describe_policy, measured, overall
from torchpi.rates import Rate
from torchpi.sim import tasks_of
from torchpi.sim.result import Episode, Evaluation, task_result

TASKS = ("faucet-open", "faucet-close")


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def noise(policy):
    config = policy.model.config
    return np.random.default_rng(0).standard_normal((config.action_horizon, config.action_dim), np.float32)


@pytest.fixture(scope="module")
def flow(policy, noise):
    return trace_request(policy, demo_observation(), noise)


# The embedded policy and its frames


def test_every_task_of_the_embedded_policy_has_frames():
    policy = torchpi.load_policy("demo", device="cpu")
    assert demo_tasks() == tuple(policy.provenance["tasks"])
    assert set(demo_tasks()) <= set(tasks_of("metaworld"))
    images = []
    for task in demo_tasks():
        observation = demo_observation(task)
        assert sorted(observation) == ["base", "prompt", "state", "wrist"]
        assert all(observation[key].shape == (96, 96, 3) for key in ("base", "wrist"))
        assert policy.infer(observation, num_steps=1)["actions"].shape == (16, 4)
        images.append(observation["base"].tobytes())
    assert len(set(images)) == len(images)


def test_unknown_task_error_lists_the_tasks_with_frames():
    with pytest.raises(KeyError, match="no packaged camera frames of 'reach'; expected drawer-open"):
        demo_observation("reach")


def test_embedded_policy_is_small():
    folder = pathlib.Path(torchpi.__file__).parent / "assets" / "demo_policy"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    weights = safetensors.safe_open(folder / "model.safetensors", framework="pt")
    assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


# The data flow


def test_data_flow_ends_at_the_inferred_chunk(policy, noise, flow):
    inferred = policy.infer(demo_observation(), noise=noise)["actions"]
    np.testing.assert_allclose(flow.actions, inferred, rtol=0, atol=1e-5)
    assert flow.chunks.shape == (11, *inferred.shape)


def test_data_flow_description_has_the_policys_shapes(policy, flow):
    text = dict(describe_flow(flow, policy))
    assert text["images"] == "base and wrist: 2 × uint8 [96, 96, 3]"
    assert "open the drawer" in text["prompt"]
    assert re.search(r": \d+ tokens, padded to \d+", text["prompt"])
    assert "10 Euler steps from noise [16, 4]" in text["action expert"]
    assert text["action chunk"].startswith("float32 [16, 4]: delta_x, delta_y, delta_z, gripper; after ")
    assert text["action chunk"].endswith(f" {policy.embodiment.execute_steps} of them at 80 Hz it observes again")


# Provenance


def results(**rates):
    return {
        "tasks": {
            task.replace("_", "-"): {"success_rate": rate, "interval": [0.5, 1.0], "episodes": 20}
            for task, rate in rates.items()
        }
    }


def test_missing_provenance_leaves_only_the_model():
    policy = random_policy()
    policy.provenance = {}
    assert [name for name, _ in describe_policy(policy)] == ["model"]
    assert measured(policy) == {}


def test_provenance_is_described():
    policy = random_policy()
    policy.provenance = {
        "source": "torchpi train",
        "recipe": {"batch_size": 64},
        "step": 4500,
        "machine": "a laptop",
        "dataset": {"num_episodes": 600, "num_frames": 50514},
        "tasks": list(TASKS),
        "metrics": [
            {"step": 50, "loss": 1.0},
            {"step": 100, "loss": 0.5, "holdout_loss": 0.4},
            {"step": 150, "loss": 0.2},
        ],
        "results": results(faucet_open=1.0, faucet_close=0.5),
        "results_blank": results(faucet_open=0.0),
    }
    description = dict(describe_policy(policy))
    for part in ("torchpi train", "4500 steps of 64 samples", "a laptop", "600 demonstrations", "50 514 frames"):
        assert part in description["weights"]
    assert description["tasks"] == "faucet-open, faucet-close"
    assert description["measured success"].startswith("75% (")
    assert description["measured success"].endswith("), 30 of 40 episodes")
    assert description["with black images"].endswith("), 0 of 20 episodes of faucet-open")
    assert description["with black images"].startswith("0% (0% – ")
    assert overall(measured(policy)).interval == Rate.of(30, 40).interval


@pytest.mark.parametrize("wrong", ["good", {}, {"tasks": {"reach": 0.5}}, {"tasks": {"reach": {"success_rate": 1}}}])
def test_invalid_results_are_an_error(wrong):
    policy = random_policy()
    policy.provenance = {"results": wrong}
    with pytest.raises(
        ValueError, match="results in the policy's provenance is not an output of `torchpi eval --json`"
    ):
        describe_policy(policy)


# Commands to try next


def field_names(arguments):
    """Field names of a dataclass and of its nested dataclasses."""
    for field in dataclasses.fields(arguments):
        yield field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory
        if dataclasses.is_dataclass(default):
            yield from field_names(default)


def test_suggested_commands_and_options_exist():
    steps = next_steps("metaworld", list(demo_tasks()), can_render=True)
    assert "--instruction 'close the faucet'" in steps[0][1]
    for _, command in [*steps, *next_steps("metaworld", ["reach"], can_render=False)]:
        words = shlex.split(command)[1:]
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
        assert options <= set(field_names(COMMANDS[name]))


def test_suggested_command_uses_the_path_of_a_program_outside_PATH(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv" / "bin" / "torchpi"), "demo"])
    assert next_steps("metaworld", ["reach"], can_render=False)[0][1] == "venv/bin/torchpi trace demo --html trace.html"


# The page


def _episode(task, index, success, video=None):
    return Episode(task, index, 7, success, 60 + index if success else 500, 8, video=video)


def _evaluation(folder, instructions):
    """Two episodes of each task, the first of them a success."""
    episodes = []
    for task in instructions:
        video = folder / f"{task}_0.mp4"
        video.write_bytes(b"video of " + task.encode())
        episodes += [_episode(task, 0, True, str(video)), _episode(task, 1, False)]
    rate = Rate.of(len(instructions), len(episodes))
    task_results = {
        task: task_result(instruction, [episode for episode in episodes if episode.task == task])
        for task, instruction in instructions.items()
    }
    return Evaluation(
        "metaworld", "demo", 0, rate.success_rate, rate.interval, task_results, None, 8, 500, blank_images=False,
        steps_per_second=100.0,
        chunk_ms=20.0, seconds=3.0, episodes=tuple(episodes), videos=tuple(e.video for e in episodes if e.video),
    )  # fmt: skip


class Tags(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects their attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.names = [], [], set()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(page, *, files=()):
    """Check that the page is well-formed, and needs only itself and the files next to it."""
    tags = Tags(page)
    assert not {"script", "link", "iframe"} & tags.names
    links = {value for key, value in tags.attributes if key in ("src", "href", "data", "action", "poster")}
    assert {link for link in links if not link.startswith(("data:", "#"))} == set(files)
    assert "http" not in re.sub(r"data:\w+/\w+;base64,[^\"]*", "", page)
    assert not re.search(r"url\((?!#)", page)


def make_demo(policy, flow, **fields):
    commands = [("Try <this>.", "torchpi demo --instruction 'a & b'")]
    return Demo(**{
        "policy": policy, "task": "drawer-open", "flow": flow, "evaluation": None, "problem": None, "frames": {},
        "commands": commands, **fields,
    })  # fmt: skip


def test_page_embeds_all_videos(policy, flow, tmp_path):
    evaluation = _evaluation(tmp_path, {"faucet-open": "open the faucet", "faucet-close": "close the faucet"})
    page = render_demo(make_demo(policy, flow, evaluation=evaluation), tmp_path)
    check_page(page, files=["faucet-open_0.mp4", "faucet-close_0.mp4"])
    assert page.count("data:video/mp4;base64,") == page.count("<video") == 2
    for text in ("“open the faucet”", "“close the faucet”", "1 of 2", "2 of 4", "60 steps", "✓ done", "20 ms"):
        assert text in page
    assert page.count('<span class="rate">') == 3  # a row per task, and one for all
    assert "measured" not in page
    assert "torchpi demo --instruction &#x27;a &amp; b&#x27;" in page


def test_large_videos_are_linked_instead_of_embedded(policy, flow, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_page, "EMBEDDED_BYTES", 10)
    evaluation = _evaluation(tmp_path, {"faucet-open": "open the faucet"})
    page = render_demo(make_demo(policy, flow, evaluation=evaluation), tmp_path)
    check_page(page, files=["faucet-open_0.mp4"])
    assert "data:video" not in page


def test_page_shows_the_policys_provenance(flow, tmp_path):
    policy = random_policy()
    policy.provenance = {
        "results": results(faucet_open=0.9),
        "metrics": [{"step": step, "loss": 2 / step, "holdout_loss": 1 / step} for step in (1, 10, 100)],
    }
    evaluation = _evaluation(tmp_path, {"faucet-open": "open", "faucet-close": "close"})
    page = render_demo(make_demo(policy, flow, evaluation=evaluation), tmp_path)
    check_page(page, files=["faucet-open_0.mp4", "faucet-close_0.mp4"])
    assert page.count("90% (50% – 100%), 18 of 20") == 1
    assert "measured in 20 episodes after training" in page
    assert "held-out episodes, EMA weights: 0.01 at the end" in page


def test_page_escapes_external_texts(policy, flow, tmp_path):
    instruction = "<script>alert('π')</script>"
    evaluation = _evaluation(tmp_path, {"faucet-open": instruction})
    page = render_demo(make_demo(policy, flow, evaluation=evaluation, problem="<b>"), tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page


def test_page_without_a_renderer_has_the_frames(policy, flow, tmp_path):
    frames = {task: (demo_observation(task), flow.actions) for task in TASKS}
    page = render_demo(make_demo(policy, flow, problem="no OpenGL (broken)", frames=frames), tmp_path)
    check_page(page)
    assert "Nothing can be rendered here: no OpenGL (broken)." in page
    assert "“open the faucet”" in page
    assert "<video" not in page
