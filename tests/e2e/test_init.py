"""`torchpi init`: four answers become commands that the command line takes."""

import io
import json
import shlex
import sys
import types

import pytest
from commands import SMALL_TRAINING, parsed, serve_once

from torchpi.cli import main
from torchpi.cli.serving import Serve
from torchpi.demo import demo_observation


@pytest.fixture
def recordings(golden_root):
    return str(golden_root / "datasets" / "lerobot_v3_video")


@pytest.fixture
def needed(monkeypatch):
    """Planned memory in GB per training, in place of the planner, which takes seconds."""
    gb = {"full": 72.0, "fsdp": 15.0, "lora": 21.0, "small": 13.0, "lora_strict": 8.0}

    def plan(config, **_):
        model, small = config.model, config.grad_accum_steps > 1
        name = "small" if model.finetune == "lora" and small else model.finetune
        name = "fsdp" if config.parallel.strategy == "fsdp" else name
        return types.SimpleNamespace(needed=1e9 * gb[name])

    monkeypatch.setattr("torchpi.training.plan.plan", plan)
    return gb


def script_of(tmp_path, monkeypatch, **answers):
    monkeypatch.chdir(tmp_path)
    main(["init", *(word for name, value in answers.items() for word in (f"--{name.replace('_', '-')}", str(value)))])
    return (tmp_path / "torchpi_commands.sh").read_text()


def commands_of(script):
    lines = [shlex.split(line) for line in script.splitlines() if line and not line.startswith(("#", "set"))]
    assert [words[0] for words in lines].count("torchpi") >= 5
    return [words[words.index("torchpi.cli") + 1 :] if "torchpi.cli" in words else words[1:] for words in lines]


@pytest.mark.parametrize("weights", ["pi05_base", "pi0_base", "demo"])
@pytest.mark.parametrize(
    ("hardware", "trained"),
    [
        ("cpu", {}),
        ("1x80", {}),
        ("1x24", {"finetune": "lora"}),
        ("1x16", {"finetune": "lora", "grad_accum_steps": 8}),
        ("1x10", {"finetune": "lora_strict", "grad_accum_steps": 8}),
        ("8x24", {"strategy": "fsdp"}),
        ("3x80", {}),
    ],
)
def test_commands_are_valid_and_training_fits_the_memory(
    weights, hardware, trained, recordings, needed, tmp_path, monkeypatch
):
    if hardware == "cpu":
        monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(total=100e9, available=100e9))
    script = script_of(tmp_path, monkeypatch, data=recordings, robot="metaworld", weights=weights, hardware=hardware)
    commands = [parsed(words) for words in commands_of(script)]
    config = next(command.config for command in commands if hasattr(command, "config") and hasattr(command, "plan"))
    found = {"finetune": config.model.finetune, "grad_accum_steps": config.grad_accum_steps}
    found["strategy"] = config.parallel.strategy
    assert found == {"finetune": "full", "grad_accum_steps": 1, "strategy": "ddp"} | trained
    count = 1 if hardware == "cpu" else int(hardware[0])
    config.micro_batch_size(count)
    assert (f"torchrun --nproc-per-node {count} -m torchpi.cli train" in script) == (count > 1)
    assert isinstance(commands[-1], Serve)
    assert (weights == "demo") == ("gs://openpi-assets/checkpoints/" not in script)


def test_questions_are_repeated_until_answers_are_valid(recordings, tmp_path, needed, monkeypatch, capsys):
    typed = iter(["nowhere", recordings, "so101", "metaworld", "nothing", "demo", "2 GPUs", "1x80"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    script = script_of(tmp_path, monkeypatch)
    assert (
        f"torchpi init --data {recordings} --robot metaworld --weights demo --hardware 1x80 --num-steps 30000" in script
    )
    printed = capsys.readouterr().out
    for message in ("There is no folder nowhere", "so101", "There is no checkpoint at nothing", "machine is '2 GPUs'"):
        assert message in printed


def test_own_robot_is_drafted_and_a_corrected_draft_is_kept(recordings, tmp_path, needed, monkeypatch, capsys):
    answers = {"data": recordings, "robot": "own", "weights": "demo", "hardware": "1x80"}
    script = script_of(tmp_path, monkeypatch, **answers)
    assert "question: " in capsys.readouterr().out
    document = json.loads((tmp_path / "my_robot.json").read_text())
    assert document["execute_steps"] == 8  # half of the chunks of these weights
    assert "--embodiment my_robot.json" in script
    (tmp_path / "my_robot.json").write_text(json.dumps(document | {"execute_steps": 7}))
    (tmp_path / "torchpi_commands.sh").unlink()
    script_of(tmp_path, monkeypatch, **answers)
    assert json.loads((tmp_path / "my_robot.json").read_text())["execute_steps"] == 7


def test_existing_folders_are_not_used_as_outputs(recordings, needed, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "my_policy_2").mkdir()
    script = script_of(tmp_path, monkeypatch, data=recordings, robot="metaworld", weights="demo", hardware="1x80")
    assert "--out run_3\n" in script
    assert "torchpi train --resume run_3 continues" in script
    assert "torchpi eval run_3/checkpoints/00030000/policy" in script
    assert "torchpi serve my_policy_3\n" in script


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"robot": None, "hardware": None}, "init needs --robot, --hardware: there is no terminal to ask for them"),
        ({"robot": "so101"}, "so101"),
        ({"robot": "so1o1"}, "Did you mean so101?"),
        ({"weights": "pi06_base"}, "There is no checkpoint at pi06_base"),
        ({"hardware": "0x80"}, "The machine is '0x80'; expected cpu, or GPUs x GB per GPU"),
        ({"hardware": "1x7"}, "fits: the smallest needs 8.0 GB, but only 93% of 7.0 GB are usable"),
        ({"out": "."}, ". exists already; choose another file, --out"),
    ],
)
def test_impossible_answer_is_an_error(changed, message, recordings, needed, tmp_path, monkeypatch, capsys):
    answers = {"data": recordings, "robot": "metaworld", "weights": "demo", "hardware": "1x80"} | changed
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit):
        script_of(tmp_path, monkeypatch, **{name: value for name, value in answers.items() if value is not None})
    assert message in capsys.readouterr().err
    assert not (tmp_path / "torchpi_commands.sh").exists()


@pytest.mark.filterwarnings("ignore:.*(never change|don't vary|warm-up|EMA|doesn't fit)")
@pytest.mark.slow
def test_script_runs_from_the_first_command_to_the_server(recordings, tmp_path, monkeypatch):
    """Uses the real planner, the embedded policy's weights and a small training."""
    script = script_of(
        tmp_path, monkeypatch, data=recordings, robot="metaworld", weights="demo", hardware="cpu", num_steps=20
    )
    for words in commands_of(script):
        if words[0] == "serve":
            assert serve_once(words, demo_observation()).shape == (16, 4)
        else:
            main([*words, *(SMALL_TRAINING.split() if words[0] == "train" else [])])
    assert (tmp_path / "plots" / "chunks.png").is_file()
