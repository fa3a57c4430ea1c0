"""The commands of docs/reproduce.md pass with --dry-run, without network access."""

import json
import pathlib
import re
import shlex
import socket

import pytest

import torchpi
from torchpi.cli import main

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    torchpi (eval .+)$", PAGE, re.MULTILINE)
PI05_LIBERO = "gs://openpi-assets/checkpoints/pi05_libero"


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command with --dry-run and returns its JSON document."""

    def refuse(*_):
        raise AssertionError("--dry-run accessed the network or the weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torchpi, "load_policy", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(line):
        main([*shlex.split(line, comments=True), "--dry-run", "--json"])
        return json.loads(capsys.readouterr().out)

    yield run
    assert list(tmp_path.iterdir()) == []


def test_page_has_a_command_for_each_number(dry_run):
    plans = [dry_run(line) for line in COMMANDS]
    found = [(plan["policy"].rpartition("/")[2], plan.get("environment", plan.get("dataset"))) for plan in plans]
    assert found == [
        *(("pi05_libero", f"libero_{suite}") for suite in ("spatial", "object", "goal", "10")),
        ("127.0.0.1:8000", "libero_spatial"),
        ("pi0_aloha_sim", "aloha_sim"),
        ("pi05_droid", "hf://brandonyang/droid_example"),
    ]
    # openpi's protocol, and the sizes that the address implies.
    assert [plan["episodes"] for plan in plans[:4]] == [500] * 4
    assert [plan["chunks, at most"] for plan in plans[:4]] == [500 * steps // 5 for steps in (220, 280, 300, 520)]
    assert {plan["embodiment"] for plan in plans[:4]} == {"pi05_libero"}
    assert {plan["parameters"] for plan in plans[:4]} == {"3.35 billion"}
    assert plans[4]["embodiment"] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{PI05_LIBERO} --env libero", "--suite spatial|object|goal|10|90"),
        (f"{PI05_LIBERO} --env libero --suite spatial --tasks 0,11", "has no task '11'"),
        (f"{PI05_LIBERO} --env libero --suite spatial --episodes 51", "50 initial states"),
        (f"{PI05_LIBERO} --env libero --suite spatial --execute-steps 11", "its chunk has only 10 actions"),
        (f"{PI05_LIBERO} --env libero --suite spatial --config nothing", "neither a file nor a preset"),
        ("gs://openpi-assets/checkpoints/pi05_droid --env libero --suite 10", "'pi05_droid' and the environment's"),
        ("gs://openpi-assets --env libero --suite spatial", "Malformed address"),
        ("nowhere --env libero --suite spatial", "There is no checkpoint at nowhere"),
        ("ws://127.0.0.1:8000 --env libero --suite spatial --config pi05", "it takes no config"),
        ("ws://127.0.0.1:8000 --env libero --suite spatial --num-steps 5", "leave num_steps out"),
        ("ws://127.0.0.1:8000 --dataset .", "There is no checkpoint at ws:"),
        ("demo --env metaworld --tasks door-open --swap faucet-open:faucet-close", "not among the tasks door-open"),
        ("demo --env metaworld --videos 1", "Videos need a folder"),
        ("demo --env metaworld --token x", "A token is for the address of a server"),
        ("demo --dataset nowhere", "There is no dataset at nowhere"),
        ("demo --dataset hf://x", "Malformed address 'hf://x' of a dataset"),
        ("demo --dataset hf://a/b --rename x", "is not a renaming"),
    ],
)
def test_dry_run_refuses_what_the_evaluation_would(dry_run, capsys, line, words):
    with pytest.raises(SystemExit):
        dry_run(f"eval {line}")
    assert words in capsys.readouterr().err


def test_dry_run_of_a_policy_that_is_there_knows_its_tasks(dry_run):
    plan = dry_run("eval demo --env metaworld --episodes 3")
    assert (plan["embodiment"], plan["episodes"]) == ("metaworld", 18)
