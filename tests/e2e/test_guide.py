"""Each command of the guide, in its order, on a very small setting: simulator, dataset, training, closed loop."""

import json
import pathlib
import re

import pytest
from commands import shortened

import torchpi
from torchpi.cli import main
from torchpi.data import LeRobotDataset

GUIDE = (pathlib.Path(__file__).parents[2] / "docs" / "from_nothing_to_a_policy.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    torchpi (.+)$", GUIDE, re.MULTILINE)
TASKS = "drawer-open,faucet-open,faucet-close"


# In so few episodes the gripper stays open.
@pytest.mark.filterwarnings("ignore:.*(never change|don't vary)")
@pytest.mark.slow
def test_the_guides_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [line.split()[0] for line in COMMANDS] == ["sim", "stats", "train", "train", "eval", "eval", "eval", "trace"]
    for line in COMMANDS:
        main(shortened(line, tasks=TASKS))
    assert len(LeRobotDataset("metaworld6", action_horizon=16).episode_lengths) == 3
    steps = [json.loads(line)["step"] for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]
    policy = torchpi.load_policy("run/checkpoints/00000020/policy")
    assert policy.provenance["tasks"] == TASKS.split(",")
    for file in ("run/curves.png", "trace.html", *(f"videos/{task}_0.mp4" for task in TASKS.split(","))):
        assert pathlib.Path(file).stat().st_size > 0
    assert "error" not in capsys.readouterr().err
