"""The command line as a user sees it: stdout and stderr, files, exit status."""

import ast
import dataclasses
import inspect
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.cli import COMMANDS, main
from torchpi.cli.arguments import in_options
from torchpi.demo import demo_observation
from torchpi.transforms import Normalization, NormStats

ROOT = pathlib.Path(__file__).parents[2]


ROBOT = Embodiment.generic(
    "two_joints",
    cameras={"base_0_rgb": "images.front", "left_wrist_0_rgb": "images.wrist"},
    state=["shoulder", "elbow"],
    actions=["shoulder", "elbow"],
)


@pytest.fixture(scope="module")
def policy(golden_root, tmp_path_factory):
    """A small policy folder."""
    sizes = {"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = Pi0Config(
        pi05=True,
        paligemma_variant=GemmaConfig(width=16, mlp_dim=32, **sizes),
        action_expert_variant=GemmaConfig(width=8, mlp_dim=16, **sizes),
        siglip_variant=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
        action_dim=3,
        action_horizon=4,
        vocab_size=512,
        image_size=28,
    )
    one = NormStats(np.zeros(2), np.ones(2), -np.ones(2), np.ones(2))
    path = tmp_path_factory.mktemp("policy") / "two_joints"
    Policy(
        torchpi.Pi0(config),
        ROBOT,
        norm_stats={"state": one, "actions": one},
        normalization={key: Normalization("quantile") for key in ("state", "actions")},
        tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
    ).save(path)
    return path


@pytest.fixture
def observation(tmp_path):
    """Observation file with nested keys joined by '.' and a 0-d prompt string."""
    example = ROBOT.example_observation()
    np.savez(
        tmp_path / "observation.npz",
        **{"images.front": example["images"]["front"], "images.wrist": example["images"]["wrist"]},
        state=example["state"],
        prompt=np.array("open the drawer"),
    )
    return tmp_path / "observation.npz"


@pytest.fixture
def arguments(policy, observation, tmp_path):
    """Arguments of a valid infer command."""
    return [
        "infer", "--policy", policy, "--inputs", observation, "--out", tmp_path / "actions.npz", "--device", "cpu",
    ]  # fmt: skip


def run(arguments):
    main([str(argument) for argument in arguments])


def fails(arguments, capsys):
    """Run a command that must fail; returns its single line on stderr."""
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


def actions(path):
    with np.load(path) as arrays:
        assert arrays.files == ["actions"]
        return arrays["actions"]


@pytest.mark.parametrize("name", ["pi05.aloha", "pi0.libero7"])
def test_infer_reproduces_openpi_actions(golden_root, policy_cases, policy_case, tmp_path, capsys, name):
    """Runs an openpi checkpoint on an observation file with nested keys and a 0-d prompt."""
    raw, case = policy_case(name)
    np.savez(tmp_path / "request.npz", **raw)
    np.save(tmp_path / "noise.npy", case["noise"])
    weights = golden_root / policy_cases[name]["weights"]
    run([
        "infer", "--policy", weights, "--inputs", tmp_path / "request.npz", "--out", tmp_path / "new" / "actions.npz",
        "--noise", tmp_path / "noise.npy", "--config", weights.parent / "model_config.json",
        "--embodiment", {"pi05.aloha": "aloha", "pi0.libero7": "libero"}[name], "--device", "cpu",
        "--norm-stats", golden_root / "policy" / name, "--tokenizer", golden_root / "tokenizer" / "tiny_spm.model",
    ])  # fmt: skip
    ours = actions(tmp_path / "new" / "actions.npz")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, case["actions"], rtol=0, atol=2e-5)
    captured = capsys.readouterr()
    assert captured.err == ""
    horizon, dims = case["actions"].shape
    assert re.fullmatch(rf"{horizon} actions of {dims} dimensions in \d+ ms, written to .*actions\.npz\n", captured.out)


def test_json_is_one_document_and_the_only_output(arguments, tmp_path, capsys):
    run([*arguments, "--json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["shape"] == [4, 2]
    assert document["out"] == str(tmp_path / "actions.npz")
    assert sorted(document["policy_timing"]) == ["infer_ms", "postprocess_ms", "preprocess_ms"]


def test_the_seed_decides_the_actions(arguments, tmp_path):
    results = []
    for seed in (0, 1, 0):
        run([*arguments, "--seed", seed])
        results.append(actions(tmp_path / "actions.npz"))
    np.testing.assert_array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_output_name_is_kept_without_npz(arguments, tmp_path):
    run([*arguments, "--out", tmp_path / "result"])
    assert actions(tmp_path / "result").shape == (4, 2)


def test_a_default_prompt_serves_observations_without_one(arguments, observation, tmp_path, capsys):
    with np.load(observation) as arrays:
        np.savez(observation, **{key: arrays[key] for key in arrays.files if key != "prompt"})
    assert "no prompt, and neither the policy nor embodiment" in fails(arguments, capsys)
    run([*arguments, "--default-prompt", "open the drawer"])
    assert (tmp_path / "actions.npz").is_file()


def test_warnings_go_to_stderr_as_one_line(arguments, observation):
    """Runs in a subprocess, where warnings are not errors."""
    with np.load(observation) as arrays:
        np.savez(observation, **arrays, temperature=np.float64(20))
    result = python(*arguments, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["shape"] == [4, 2]
    assert re.fullmatch(r"warning: Embodiment 'two_joints' ignores temperature .*\n", result.stderr)


def test_the_demo_policy_can_be_named(tmp_path):
    np.savez(tmp_path / "observation.npz", **demo_observation())
    run([
        "infer", "--policy", "demo", "--inputs", tmp_path / "observation.npz", "--out", tmp_path / "actions.npz",
        "--num-steps", "1", "--device", "cpu",
    ])  # fmt: skip
    assert actions(tmp_path / "actions.npz").shape == (16, 4)


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "torchpi.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# User errors


def write_text(path):
    path.write_text("no arrays")


def write_nothing(path):
    path.write_bytes(b"")


def write_npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_objects(path):
    with path.open("wb") as file:
        np.savez(file, state=np.array([{"a": 1}], dtype=object))


def write_truncated(path):
    write_compressed(path)
    path.write_bytes(path.read_bytes()[:-40])


def write_flipped(path):
    write_compressed(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
    path.write_bytes(data)


def write_compressed(path):
    with path.open("wb") as file:
        np.savez_compressed(file, state=np.random.default_rng(0).standard_normal(2000))


@pytest.mark.parametrize("write", [write_text, write_nothing, write_npy, write_objects, write_truncated, write_flipped])
def test_invalid_npz_inputs_are_an_error(arguments, observation, capsys, write):
    write(observation)
    error = fails(arguments, capsys)
    assert f"{observation} is not an .npz file of plain arrays, or is damaged: " in error


def test_infer_writes_samples_and_prints_their_spread(arguments, tmp_path, capsys):
    run([*arguments, "--num-steps", 2])
    with np.load(tmp_path / "actions.npz") as arrays:
        alone = arrays["actions"]
    capsys.readouterr()
    run([*arguments, "--num-steps", 2, "--num-samples", 3, "--pick", "velocity_residual"])
    with np.load(tmp_path / "actions.npz") as arrays:
        found = dict(arrays)
    assert found["samples"].shape == (3, *alone.shape)
    np.testing.assert_allclose(found["samples"][0], alone, atol=1e-4)
    assert found["sample_index"] == found["velocity_residuals"].argmin()
    assert np.array_equal(found["actions"], found["samples"][found["sample_index"]])
    assert f"sample {found['sample_index']} of 3; uncertainty " in capsys.readouterr().out


@pytest.mark.parametrize("write", [write_text, write_nothing, write_objects, write_compressed])
def test_invalid_noise_file_is_an_error(arguments, tmp_path, capsys, write):
    write(tmp_path / "noise.npy")
    error = fails([*arguments, "--noise", tmp_path / "noise.npy"], capsys)
    assert "noise.npy is not an .npy file of a plain array, or is damaged: " in error


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--inputs", "nowhere.npz"], "There is no file nowhere.npz; check its path."),
        (["--noise", "nowhere.npy"], "There is no file nowhere.npy"),
        (["--policy", "nowhere"], "There is no checkpoint at nowhere"),
        (["--policy", "hf://pi05"], "Malformed address 'hf://pi05'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--num-steps", "0"], "num_steps must be a positive integer, got 0"),
        (["--policy", "demo", "--embodiment", "aloha"], "'metaworld', whose state has 4 dimensions; that of"),
    ],
)
def test_wrong_argument_prints_one_line_and_exits_with_1(arguments, capsys, wrong, message):
    assert message in fails([*arguments, *wrong], capsys)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--config", "pi06"], "--config 'pi06' is neither a file nor a preset; presets are pi0, pi05, tiny"),
        (["--config", "pi05"], "--config contradicts the checkpoint's arrays: pi05 is True in config, False in"),
        (["--embodiment", "libro"], "Unknown embodiment 'libro'; known are aloha, droid, libero"),
        (["--asset-id", "trossen"], "no statistics for asset_id 'trossen'; it has tiny_robot"),
        (["--tokenizer", "nowhere.model"], "No tokenizer file at nowhere.model"),
        (["--norm-stats", "nowhere.json"], "No normalization statistics at nowhere.json"),
    ],
)
def test_wrong_checkpoint_argument_prints_one_line_and_exits_with_1(arguments, golden_root, capsys, wrong, message):
    checkpoint = [
        "--policy", golden_root / "pi0" / "jax_ckpt_pure", "--embodiment", "libero",
        "--tokenizer", golden_root / "tokenizer" / "tiny_spm.model",
    ]  # fmt: skip
    assert message in fails([*arguments, *checkpoint, *wrong], capsys)


def test_folder_as_output_file_prints_one_line_and_exits_with_1(arguments, tmp_path, capsys):
    assert "Is a directory" in fails([*arguments, "--out", tmp_path], capsys)


def test_unfitting_observation_prints_one_line_and_exits_with_1(arguments, observation, capsys):
    with np.load(observation) as arrays:
        np.savez(observation, **{key: arrays[key] for key in arrays.files if key != "images.wrist"})
    error = fails(arguments, capsys)
    assert "The observation has no image 'images.wrist' (camera left_wrist_0_rgb)" in error
    assert "'The observation" not in error  # str(KeyError) would put the message in quotes


def test_mistyped_option_gets_suggestions_from_its_own_command_only(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["serve", "demo", "--prot", "8001"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "--port INT" in printed
    assert "--prompt" not in printed
    assert "torchpi train" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "--help"], "There is no command 'trian'; did you mean torchpi train?"),
        (["inspect", "my_set"], "There is no command 'inspect'; did you mean torchpi data inspect?"),
        (["data", "drat"], "There is no command 'data drat'; did you mean torchpi data draft?"),
        (["fly"], "There is no command 'fly'. torchpi --help lists them."),
    ],
)
def test_unknown_command_prints_one_line(words, message, capsys):
    assert message in fails(words, capsys)


def test_shell_completion_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["--tyro-print-completion", "bash"])
    assert ended.value.code in (0, None)
    assert "Bash completion for torchpi" in capsys.readouterr().out


def test_unknown_names_and_existing_folders_are_errors(tmp_path, capsys):
    assert "neither a checkpoint nor a preset pi06; presets are" in fails(["trace", "pi06"], capsys)
    message = fails(["train", "--plan-memory", "3"], capsys)
    assert message == "error: --plan-world, --plan-memory and --json belong to --plan.\n"
    message = fails(["pull", "org/name", "--out", tmp_path], capsys)
    assert f"{tmp_path} exists already; choose another folder for --out" in message


def test_closed_pipe_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)  # as `torchpi train --help | head` does
    command = [sys.executable, "-m", "torchpi.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# Help


def annotated(field, property):
    """Name or help that an argument's type annotation states; None if it states none."""
    found = (getattr(annotation, property, None) for annotation in getattr(field.type, "__metadata__", ()))
    return next(filter(None, found), None)


def documented_fields(arguments):
    """Fields of a dataclass and of nested ones, each with its docstring or the help of its type."""
    body = ast.parse(textwrap.dedent(inspect.getsource(arguments))).body[0].body
    docstrings = {
        field.target.id: after.value.value
        for field, after in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    for base in arguments.__bases__:
        if dataclasses.is_dataclass(base):
            yield from documented_fields(base)
    for field in dataclasses.fields(arguments):
        if dataclasses.is_dataclass(field.default):
            yield from documented_fields(type(field.default))
        elif dataclasses.is_dataclass(field.default_factory):
            yield from documented_fields(field.default_factory)
        elif docstring := docstrings.get(field.name) or annotated(field, "help"):
            yield annotated(field, "name") or field.name, docstring
        else:
            inherited = (base.__dataclass_fields__ for base in arguments.__bases__)
            assert any(field.name in fields for fields in inherited), f"{field.name} is not documented"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_argument(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: None)" not in shown
    assert "(default: '')" not in shown
    text = shown.lower()
    assert inspect.getdoc(COMMANDS[command]).splitlines()[0].lower()[:40] in text
    assert "none}" not in text
    for name, docstring in documented_fields(COMMANDS[command]):
        if name == "mixture":  # a list of objects, for recipes in files
            continue
        assert f"--{name.replace('_', '-')}" in text or "positional" in text, name
        assert " ".join(docstring.lower().split()[:2]) in text, name
        # tyro shows the source's line breaks: they must follow a sentence.
        assert all(line.endswith((".", ";", ":")) for line in docstring.split("\n")[:-1]), name
    paragraphs = inspect.getdoc(COMMANDS[command]).split("\n\n")
    assert all(line[0].isalpha() for text in paragraphs for line in text.split("\n")[1:])


def test_dataset_options_have_one_help_text_in_all_commands():
    by_name = dict(documented_fields(COMMANDS["stats"]))
    train = dict(documented_fields(COMMANDS["train"]))
    for name in ("rename", "fps", "tolerance_s"):
        assert train[name] == by_name[name]


def test_version(capsys):
    run(["--version"])
    assert capsys.readouterr().out == f"torchpi {torchpi.__version__}\n"


def test_a_positional_argument_can_be_given_by_its_name(policy, observation, tmp_path, capsys):
    """Also covers former option names."""
    words = ["--inputs", observation, "--out", tmp_path / "actions.npz", "--num-steps", 1, "--device", "cpu"]
    for given in ([policy], [f"--policy={policy}"], ["--policy", "nowhere", "--policy", policy]):
        run(["infer", *given, *words])
    run(["compare", policy, policy, "--observation", observation, "--device", "cpu"])
    assert "Every stage is the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("train --policy.path=x", "--init"),
        ("train --policy.type pi05", "--model"),
        ("train --dataset.repo_id=org/name", "--dataset"),
        ("train --output_dir x --steps 10", "--out"),
        ("train --eval.n_episodes 3", "--env-episodes"),
        ("eval --policy.path=x --env.type=metaworld", "POLICY"),
        ("eval demo --eval.n_episodes 3", "--episodes"),
        ("serve --policy.dir=x", "POLICY"),
        ("serve demo --policy.config=pi05_libero", "--config"),
        ("stats --dataset.repo_id=org/name", "DATASET"),
        ("train --optim.lrr 3", "--lr"),
        ("train --wandb.mode offline", "--wandb-project and --wandb-name"),
        ("eval demo --env.name libero", "--env"),
        ("train --lr_schedule.peak_lr 1", "--lr"),
        ("train --episode 3", "--select"),
        ("eval demo --load.device cpu", "--device"),
        ("serve demo --server.prt=3", "--port"),
    ],
)
def test_lerobot_and_openpi_options_are_refused_with_their_replacement(capsys, words, option):
    command = words.split()[0]
    message = fails(words.split(), capsys)
    assert re.fullmatch(rf"error: torchpi {command} has no --\S+, it has {option}; see torchpi .* --help.\n", message)


def test_optional_option_accepts_none(capsys):
    message = fails(["train", "--init", "None", "--embodiment", "metaworld", "--plan"], capsys)
    assert "Say which weights to start from (--init" in message


def test_messages_name_command_line_options(golden_root, capsys):
    checkpoint = golden_root / "pi05" / "jax_ckpt_pure"
    message = fails(["doctor", checkpoint], capsys)
    assert "pass --embodiment, one of aloha" in message
    assert "(and --config, one of pi0" in message
    train = ["train", "--embodiment", "metaworld", "--plan", "--init", checkpoint, "--model", "pi05"]
    assert "--model contradicts the checkpoint's arrays" in (message := fails(train, capsys))
    assert "--adapt cuts or extends action_dim" in message
    train = ["train", "--dataset", "x", "--embodiment", "metaworld", "--out", "y", "--init", checkpoint]
    assert '(--model): a JSON file such as {"action_horizon": 50}.' in fails(train, capsys)
    options = {"config": "--model", "adapt": "--adapt", "path": "PATH"}
    for text, shown in {
        "pass config=x": "pass --model x",
        "config='a/b.json' is": "--model 'a/b.json' is",
        "no sets/config=3/data, path= too": "no sets/config=3/data, path= too",
        "adapt=True cuts; config= in Python": "--adapt cuts; config= in Python",
    }.items():
        assert in_options(text, options) == shown


def test_a_renamed_option_is_refused_with_its_new_name(capsys, monkeypatch):
    monkeypatch.setattr(COMMANDS["infer"], "renamed", {"--euler-steps": "--num-steps"}, raising=False)
    for words in (["--euler-steps", "3"], ["--euler_steps=3"]):
        assert fails(["infer", *words], capsys) == "error: --euler-steps is now --num-steps.\n"


def test_help_lists_the_commands_in_a_subprocess():
    result = python("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("words", [[], ["data"], ["sim", "--help"]])
def test_commands_are_listed_in_groups_a_line_each(words, capsys):
    run(words)
    lines = capsys.readouterr().out.splitlines()
    listed = [name for name in COMMANDS if name.startswith(" ".join(words[:1]))]
    assert [line[2:15].strip() for line in lines if line.startswith("  ")] == listed
    assert max(map(len, lines)) <= 80


def test_unexpanded_home_folder_is_expanded(arguments, tmp_path, monkeypatch):
    """A shell does not expand the ~ in --out=~/actions.npz."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run([*arguments, "--out=~/home.npz"])
    assert actions(tmp_path / "home.npz").shape == (4, 2)


def test_choices_of_an_optional_option_are_sorted(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "demo", "--engine", "jit"])
    found = " ".join(re.findall(r"'\w+'", capsys.readouterr().err))
    assert found.endswith("'auto' 'compiled' 'eager' 'graph' 'None'")
