"""The README's commands and Python blocks run, and the tree of CONTRIBUTING.md is complete."""

import pathlib
import re
import shlex
import shutil
import types

import numpy as np
import pytest
from commands import serve_once, shortened
from hub_server import running_hub

import torchpi
from torchpi.assets import assets
from torchpi.cli import COMMANDS, main
from torchpi.demo import demo_observation
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = re.findall(r"^    torchpi (.+)$", README, re.MULTILINE)
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def in_simulation(line: str) -> bool:
    commands = ("demo", "sim", "data", "stats", "train", "eval", "view", "init")
    return line.split()[0] in commands and not is_guide_command(line)


def is_guide_command(line: str) -> bool:
    """True for a command of the section "Training", which the guide's tests run."""
    return bool(re.search(r"my_(test_)?set", line))


def test_readme_has_every_command_and_three_blocks():
    assert len(COMMAND_LINES) >= 6
    first_words = [shlex.split(line, comments=True)[0] for line in COMMAND_LINES]
    assert set(first_words) == {command.split()[0] for command in COMMANDS}
    assert len(PYTHON_BLOCKS) == 3


# With so few episodes the gripper never closes.
@pytest.mark.filterwarnings("ignore:.*(never change|don't vary|doesn't fit)")
@pytest.mark.slow
def test_simulator_commands_run(tmp_path, monkeypatch, capsys):
    """Run in order on small sizes, because later commands read the files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    for line in filter(in_simulation, COMMAND_LINES):
        main(
            [*shortened(line, tasks="drawer-open,door-open"), *(["--episodes", "1"] if line.startswith("demo") else [])]
        )
        assert capsys.readouterr().out
    for folder in ("torchpi_demo", "metaworld6", "run"):
        assert any(pathlib.Path(folder).iterdir())


def test_training_commands_are_those_is_guide_command():
    guide = (ROOT / "docs" / "fine_tune.md").read_text(encoding="utf-8")
    lines = [line for line in COMMAND_LINES if is_guide_command(line)]
    assert [line.split()[0] for line in lines] == ["stats", "train", "eval"]
    own = {"fine_tuned", "fine_tuned/checkpoints/00030000/policy"}
    for line in lines:
        assert any(
            set(shlex.split(line)) - own <= set(shlex.split(other))
            for other in re.findall(r"^    torchpi (.+)$", guide, re.MULTILINE)
        ), line


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            line, marks=[pytest.mark.slow] if re.match(r"(trace (--compare|pi05)|bench|push|pull)", line) else []
        )
        for line in COMMAND_LINES
        if not in_simulation(line) and not is_guide_command(line)
    ],
)
def test_command_runs(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("observation.npz", **demo_observation())
    arguments = shlex.split(line, comments=True)
    if arguments[0] in ("push", "pull"):
        shutil.copytree(assets() / "demo_policy", "my_policy")
        with running_hub(tmp_path, monkeypatch) as server:
            server.members["ORG"] = {"alice"}
            main(["push", "my_policy", "ORG/my_policy"])
            main(arguments)
        assert "next: torchpi" in capsys.readouterr().out
        return
    if arguments[0] == "serve":
        assert serve_once(arguments, demo_observation()).shape == (16, 4)
        return
    main(arguments)
    assert capsys.readouterr().out
    for option in ("--html", "--out"):
        if option in arguments:
            assert pathlib.Path(arguments[arguments.index(option) + 1]).stat().st_size > 0


SPECIAL = ("paligemma_tokenizer", "ControlLoop")
"""Words in blocks that need published weights, or a server and a robot."""


@pytest.mark.parametrize("block", [block for block in PYTHON_BLOCKS if not any(word in block for word in SPECIAL)])
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"torchpi": torchpi})


def test_control_loop_block_controls_a_robot(capsys):
    """With a server of the embedded policy, and a robot that always returns the same observation.

    The control loop runs at 0.5 Hz, so that a chunk lasts 32 s and arrives in time even on a busy machine.
    """
    (block,) = (block for block in PYTHON_BLOCKS if "ControlLoop" in block)
    observation, commands = demo_observation(), []
    robot = types.SimpleNamespace(observe=lambda: observation, act=commands.append)
    with running_server({"demo": lambda: torchpi.load_policy("demo")}, ServeSettings(port=0)) as (address, _):
        for old, new in (
            ("ws://127.0.0.1:8000", address),
            ("seconds=60", "steps=2"),
            ("timeout=1.0", "timeout=60.0"),
            ('mode="rtc"', 'mode="rtc", control_hz=0.5, resample="as_is"'),
        ):
            assert block.count(old) == 1
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), {"robot": robot})
    assert commands
    assert np.isfinite(commands).all()
    assert "chunks" in capsys.readouterr().out


def test_published_checkpoints_block_names_existing_presets(golden_root, tmp_path, monkeypatch):
    """Preset, embodiment and arguments exist; the only error is that a small checkpoint contradicts the preset."""
    (block,) = (block for block in PYTHON_BLOCKS if "paligemma_tokenizer" in block)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("checkpoints").mkdir()
    pathlib.Path("checkpoints/pi05_droid").symlink_to(golden_root / "pi05" / "jax_ckpt_pure")
    pathlib.Path("paligemma_tokenizer.model").symlink_to(golden_root / "tokenizer" / "tiny_spm.model")
    with pytest.raises(ValueError, match="contradicts the checkpoint's arrays"):
        exec(compile(block, "README.md", "exec"), {"torchpi": torchpi})


def test_repository_tree_is_complete():
    """Every part of the package is in the tree, and every Python file in the tree exists."""
    package = ROOT / "src" / "torchpi"
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("## Repository") : text.index("## House rules")]
    parts = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    parts += [path.name for path in package.glob("[!_]*.py")]
    assert [part for part in parts if not re.search(rf"(?<![\w/]){re.escape(part)}(?=[\s:])", tree)] == []
    existing = {path.name for folder in ("src", "examples", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", tree)) - existing == set()
