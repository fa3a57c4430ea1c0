"""Success rates of a policy in simulated episodes, checks before a run, and `torchpi eval --env`."""

import dataclasses
import json
import multiprocessing
import pathlib
import sys
import types

import numpy as np
import pytest
from sim_helpers import (
    HORIZON,
    corridor,  # noqa: F401
    python,
    random_policy,
    require_simulator,
)

from torchpi.cli import main
from torchpi.rates import wilson_interval
from torchpi.robots import Embodiment, aloha, get_embodiment, metaworld
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi.sim import simulator, swapped_instructions
from torchpi.sim.actors import check_embodiment, check_metadata
from torchpi.sim.environment import environment_seed
from torchpi.sim.evaluate import evaluate
from torchpi.sim.result import print_evaluation
from torchpi.sim.rollout import Rollout, episode_noise


class Walker:
    """Goes forward if the prompt says to go a short way; records its requests."""

    def __init__(self):
        self.requests = []

    def infer(self, observation, **options):
        self.requests.append((observation, options))
        speed = 1.0 if "short" in observation["prompt"] else 0.0
        return {"actions": np.tile([speed, 0, 0, 0], (4, 1))}


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "random"
    policy.save(path)
    return path


def quiet(policy, env="corridor", **options):
    return evaluate(policy, env, progress=False, **options)


# Numbers


@pytest.mark.parametrize(
    ("successes", "episodes", "interval"),
    [
        # With 0 or n successes, the other bound is z²/(n + z²) away.
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
        (5, 10, (0.23659, 0.76341)),
        # From Brown, Cai and DasGupta (2001) and R's binom.wilson.
        (8, 10, (0.49016, 0.94332)),
        (1, 20, (0.00888, 0.23613)),
        (81, 263, (0.25529, 0.36621)),
        (1, 1, (0.20655, 1.0)),
    ],
)
def test_wilson_interval(successes, episodes, interval):
    assert wilson_interval(successes, episodes) == pytest.approx(interval, abs=1e-5)


def test_evaluation_counts_successes_per_task(corridor):  # noqa: F811
    result = quiet(Walker(), episodes=6, seed=3)
    seeds = [environment_seed("eval", 3, "short", index) for index in range(6)]
    steps = [5 + seed % 5 for seed in seeds]
    short, long = result.tasks["short"], result.tasks["long"]
    assert (short.success_rate, short.interval, short.episodes) == (1.0, wilson_interval(6, 6), 6)
    assert short.mean_steps == pytest.approx(np.mean(steps))
    assert short.median_steps == np.median(steps)
    assert (long.success_rate, long.mean_steps, long.median_steps) == (0.0, None, None)
    assert (result.success_rate, result.interval) == (0.5, wilson_interval(6, 12))
    episodes = [(e.task, e.index, e.seed, e.success, e.steps, e.num_chunks) for e in result.episodes[:6]]
    # half of a chunk of four is executed
    expected = zip(seeds, steps, strict=True)
    assert episodes == [("short", i, seed, True, n, -(-n // 2)) for i, (seed, n) in enumerate(expected)]
    assert [(e.task, e.index, e.steps) for e in result.episodes[6:]] == [("long", i, 40) for i in range(6)]
    assert result.steps_per_second > 0
    assert result.chunk_ms > 0
    assert (result.seed, result.max_steps, result.env) == (3, 40, "corridor")
    assert [made.task for made in corridor] == ["short", "long"]
    assert all(made.log[-1] == "close" for made in corridor)
    json.dumps(result.to_dict(), allow_nan=False)


def test_instructions_can_be_swapped(corridor):  # noqa: F811
    result = quiet(Walker(), episodes=2, instructions=swapped_instructions("corridor", ["short:long"]))
    assert {name: task.success_rate for name, task in result.tasks.items()} == {"short": 0.0, "long": 1.0}
    assert result.tasks["long"].instruction == "go a short way"


def test_images_can_be_blank(corridor):  # noqa: F811
    walker = Walker()
    result = quiet(walker, episodes=1, rollout=Rollout(blank_images=True))
    assert result.blank_images
    assert not any(observation["base"].any() or observation["wrist"].any() for observation, _ in walker.requests)


def test_episodes_do_not_depend_on_the_order_of_tasks(corridor, policy):  # noqa: F811
    def results(**options):
        result = quiet(policy, episodes=2, rollout=Rollout(max_steps=17), **options)
        return {(e.task, e.index): (e.seed, e.steps, e.success) for e in result.episodes}

    both = results(tasks=["short", "long"])
    assert results(tasks=["long", "short"]) == both
    single = results(tasks=["long"])
    assert single == {key: value for key, value in both.items() if key[0] == "long"}


def test_noise_depends_on_episode_and_chunk(corridor, policy, monkeypatch):  # noqa: F811
    noises = []
    infer = policy.infer

    def watched(observation, **options):
        noises.append(options["noise"])
        return infer(observation, **options)

    monkeypatch.setattr(policy, "infer", watched)
    result = quiet(policy, tasks=["long"], episodes=3, seed=4, rollout=Rollout(1, max_steps=3))
    numbers = [(episode.index, chunk) for episode in result.episodes for chunk in range(episode.num_chunks)]
    assert len(numbers) > 5
    expected = [episode_noise(4, "long", index, (HORIZON, 4))(chunk) for index, chunk in numbers]
    np.testing.assert_array_equal(noises, expected)


def test_first_of_several_samples_equals_a_single_sample(corridor, policy):  # noqa: F811
    outcomes = {}
    for samples in (None, 2):
        rollout = Rollout(num_steps=1, num_samples=samples, pick=samples and "first")
        result = evaluate(policy, "corridor", tasks=["short"], episodes=2, rollout=rollout, progress=False)
        outcomes[samples] = [(episode.success, episode.steps) for episode in result.episodes]
        assert (result.num_samples, result.pick) == (samples, samples and "first")
    assert outcomes[None] == outcomes[2]


def test_number_of_threads_is_restored_and_table_is_printed(corridor, policy, capsys):  # noqa: F811
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = evaluate(policy, "corridor", episodes=2, rollout=Rollout(num_steps=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    print_evaluation(result)
    printed = capsys.readouterr().out
    for text in ("go a short way", "95 % interval", "all", "ms per chunk"):
        assert text in printed


def test_unstable_episodes_are_reported(corridor, capsys):  # noqa: F811
    breaking = types.SimpleNamespace(infer=lambda observation: {"actions": np.ones((2, 4))})
    result = quiet(breaking, tasks=["short"], episodes=2)
    assert [(episode.success, episode.unstable, episode.steps) for episode in result.episodes] == [(False, True, 1)] * 2
    print_evaluation(result)
    assert "2 of the episodes failed because an action broke the simulation" in capsys.readouterr().out


# Choice of tasks


def test_default_tasks_are_those_of_the_training(corridor, monkeypatch):  # noqa: F811
    walker = Walker()
    walker.provenance = {"tasks": ["long"]}
    assert list(quiet(walker, episodes=1).tasks) == ["long"]
    walker.provenance = {"tasks": ["drawer-open"]}  # of another environment
    assert list(quiet(walker, episodes=1).tasks) == ["short", "long"]
    monkeypatch.setattr("torchpi.sim.actors.MANY_TASKS", 1)
    with pytest.raises(ValueError, match=r"does not say on which tasks of corridor .*\(--tasks\): short, long"):
        quiet(walker, episodes=1)


def test_metaworld_needs_tasks_if_the_policy_states_none():
    with pytest.raises(ValueError, match=r"\(--tasks\): assembly, basketball"):
        quiet(Walker(), "metaworld")


# Mismatches


def robot(**changes):
    return dataclasses.replace(metaworld(), **changes)


@pytest.mark.parametrize(
    ("embodiment", "message"),
    [
        (
            Embodiment.generic(
                "three_eyes",
                cameras={"base_0_rgb": "base", "left_0_rgb": "left", "wrist_0_rgb": "wrist"},
                state=metaworld().state_names,
                actions=["x", "y", "z", "g"],
            ),
            "'three_eyes' and the environment's 'metaworld' do not fit: the policy requires the cameras base, left, "
            "wrist, the environment has base, wrist",
        ),
        (robot(state=metaworld().state[:0] + get_embodiment("libero").state), "the policy reads a state of"),
        (
            robot(actions=metaworld().actions[:3]),
            r"actions have 3 dimensions \(delta_x, delta_y, delta_z\), the environment takes 4 \(delta_x",
        ),
        (robot(control_hz=20), "acts at 20 Hz, the environment at 80 Hz"),
        (
            robot(cameras=tuple(dataclasses.replace(camera, layout="chw") for camera in metaworld().cameras)),
            "reads camera base as chw, the environment sends hwc",
        ),
        (
            robot(actions=metaworld().actions[::-1]),
            "the policy's actions are in the order gripper, .*, delta_x, the environment's delta_x, .*, gripper",
        ),
        (
            robot(actions=tuple(dataclasses.replace(a, command="velocity") for a in metaworld().actions)),
            "delta_x of the policy's actions is 'velocity', of the environment's 'increment'",
        ),
        (aloha(), "the policy requires the cameras images.cam_high, the environment has base, wrist"),
    ],
)
def test_embodiment_mismatch_error_names_both_sides(embodiment, message):
    with pytest.raises(ValueError, match=message):
        check_embodiment(embodiment, metaworld())
    check_embodiment(metaworld(), metaworld())


def test_degrees_and_calibrated_ranges_do_not_fit():
    so101, normalized = get_embodiment("so101"), get_embodiment("so101_normalized")
    sides = "'so101_normalized' and the environment's 'so101' do not fit: shoulder_pan.pos of the policy's"
    with pytest.raises(ValueError, match=f"{sides} actions is '-100 to 100 of the .*', of the environment's 'deg'"):
        check_embodiment(normalized, so101)
    with pytest.raises(ValueError, match=f"{sides} state is '-100 to 100 of the .*', of the environment's 'deg'"):
        check_embodiment(dataclasses.replace(normalized, actions=so101.actions), so101)
    other_spelling = [dataclasses.replace(action, unit="degrees") for action in so101.actions]
    check_embodiment(dataclasses.replace(so101, actions=tuple(other_spelling)), so101)
    served = {"action_names": normalized.action_names, "action_units": list(normalized.action_units)}
    with pytest.raises(ValueError, match="of the policy's actions is '-100 to 100"):
        check_metadata(served, so101)


def test_unstated_control_rate_fits():
    check_embodiment(robot(control_hz=None), metaworld())


def test_aloha_policies_fit_the_simulator():
    """The policies' wrist cameras, which the simulator lacks, are optional."""
    for name in ("aloha", "pi0_aloha_sim"):
        check_embodiment(get_embodiment(name), simulator("aloha_sim").embodiment)


def test_policy_of_another_robot_is_refused(corridor):  # noqa: F811
    with pytest.raises(ValueError, match="'libero' and the environment's 'metaworld' do not fit"):
        quiet(random_policy(get_embodiment("libero")))
    assert corridor == []


def test_policy_without_action_horizon_is_refused(corridor):  # noqa: F811
    with pytest.raises(ValueError, match="The model's action_horizon is not set"):
        quiet(random_policy(action_horizon=None))


def test_execute_steps_beyond_the_chunk_is_an_error(corridor, policy):  # noqa: F811
    with pytest.raises(ValueError, match="execute_steps is 17, but its chunk has only 16 actions"):
        quiet(policy, rollout=Rollout(17))
    short = random_policy(action_horizon=3)
    with pytest.raises(ValueError, match="The policy recommends executing 4, but its chunk has only 3 actions"):
        quiet(short)
    assert quiet(short, episodes=1, rollout=Rollout(3, num_steps=1)).execute_steps == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["fly"]}, KeyError, "corridor has no task 'fly'; its tasks are short, long"),
        ({"tasks": []}, ValueError, "at least one task"),
        ({"tasks": ["long", "long"]}, ValueError, "each once, got long, long"),
        ({"episodes": 0}, ValueError, "at least one episode"),
        ({"episodes": 2, "videos": 3, "out": "videos"}, ValueError, "at most as many videos, got 2 and 3"),
        ({"videos": 1}, ValueError, "Videos need a folder"),
        ({"seed": -1}, ValueError, "The seed is -1; expected a whole number from 0 to 2147483647"),
        ({"seed": 2**31}, ValueError, "expected a whole number from 0 to 2147483647"),
        ({"workers": 2}, ValueError, "A Policy object can't be shared by 2 processes"),
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"load": {"device": "cpu"}}, ValueError, "loaded already; it takes no device"),
        ({"tasks": ["long"], "instructions": {"short": "x"}}, KeyError, "instruction for short, which is not among"),
    ],
)
def test_invalid_argument_is_an_error(corridor, policy, options, error, message):  # noqa: F811
    with pytest.raises(error, match=message):
        quiet(policy, **options)
    assert corridor == []


def test_unknown_environment_is_an_error(policy):
    with pytest.raises(KeyError, match="There is no environment 'maniskill'; expected metaworld, aloha_sim"):
        quiet(policy, "maniskill")


@pytest.mark.parametrize("pair", ["short", "short:", ":long", "short:long:short"])
def test_invalid_swap_is_an_error(corridor, pair):  # noqa: F811
    with pytest.raises(ValueError, match="A swap is two tasks with ':' between them"):
        swapped_instructions("corridor", [pair])
    with pytest.raises(KeyError, match="corridor has no task 'fly'"):
        swapped_instructions("corridor", ["short:fly"])
    with pytest.raises(ValueError, match="each once, got short, long, long, short"):
        swapped_instructions("corridor", ["short:long", "long:short"])
    with pytest.raises(ValueError, match="0 and 28 of libero_90 have the same instruction, 'close the top drawer"):
        swapped_instructions("libero_90", ["0:28"])


def test_error_names_the_failing_episode(corridor):  # noqa: F811
    nan = types.SimpleNamespace(infer=lambda observation: {"actions": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"episode 0 of task short \(seed \d+\): The policy returned actions \[2, 3\]"):
        quiet(nan)


# A served policy


class Served:
    """Fake of torchpi_client.WebsocketPolicy."""

    metadata = {"embodiment": "metaworld", "action_names": list("xyzg"), "control_hz": 80, "execute_steps": 3}  # noqa: RUF012
    opened: list["Served"] = []  # noqa: RUF012

    def __init__(self, url, *, api_key):
        if "nowhere" in url:
            raise ServedError("no policy here")
        self.url, self.walker, self.closed = url, Walker(), 0
        self.opened.append(self)

    def infer(self, observation):
        return self.walker.infer(observation)

    def close(self):
        self.closed += 1


class ServedError(RuntimeError):
    pass


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(Served, "opened", [])
    monkeypatch.setattr(Served, "metadata", dict(Served.metadata))
    module = types.ModuleType("torchpi_client")
    module.WebsocketPolicy, module.ServerError = Served, ServedError
    monkeypatch.setitem(sys.modules, "torchpi_client", module)
    return Served


def test_served_policy_gets_no_noise(corridor, client):  # noqa: F811
    result = quiet("ws://robot:8000", tasks=["short"], episodes=2, workers=1)
    (served,) = client.opened
    assert (served.url, served.closed) == ("ws://robot:8000", 1)
    assert {tuple(options) for _, options in served.walker.requests} == {()}
    assert (result.success_rate, result.policy, result.execute_steps) == (1.0, "ws://robot:8000", 3)


def test_connection_is_closed_without_episodes_to_run_or_after_an_error(corridor, client, tmp_path):  # noqa: F811
    for _ in range(2):
        quiet("ws://robot:8000", tasks=["short"], episodes=1, workers=1, out=tmp_path, resume=True)
    with pytest.raises(KeyError, match="no task 'fly'"):
        quiet("ws://robot:8000", tasks=["fly"])
    assert [served.closed for served in client.opened] == [1, 1, 1]


def test_served_policys_metadata_are_checked(corridor, client):  # noqa: F811
    client.metadata["control_hz"] = 50
    with pytest.raises(ValueError, match=r"served policy \(metaworld\) and the environment 'metaworld' do not fit"):
        quiet("ws://robot:8000", workers=1)
    client.metadata |= {"control_hz": 80, "action_names": ["x"]}
    with pytest.raises(ValueError, match="actions have 1 dimensions"):
        quiet("ws://robot:8000", workers=1)
    check_metadata({}, metaworld())  # openpi's server sends no metadata


def test_settings_of_the_server_are_refused(corridor, client):  # noqa: F811
    with pytest.raises(ValueError, match="sets its number of Euler steps; leave num_steps out"):
        quiet("ws://robot:8000", rollout=Rollout(num_steps=5))
    with pytest.raises(ValueError, match="sets its number of samples"):
        quiet("ws://robot:8000", rollout=Rollout(num_samples=5))
    with pytest.raises(ValueError, match="This policy's server loads it; it takes no device"):
        quiet("ws://robot:8000", load={"device": "cpu"})
    with pytest.raises(ConnectionError, match="no policy here"):
        quiet("ws://nowhere")


def test_missing_client_error_has_the_install_command(corridor, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torchpi_client", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchpi-client"):
        quiet("ws://robot:8000")


# A server with a token

TOKEN = "open-sesame"


@pytest.fixture
def address(policy):
    with running_server({"policy": lambda: policy}, ServeSettings(port=0, token=TOKEN)) as (url, _):
        yield url


def evaluated(capsys, *arguments):
    """The JSON document of `torchpi eval`."""
    main(["eval", *arguments, "--episodes", "1", "--max-steps", "2", "--json"])
    return capsys.readouterr().out


@pytest.mark.parametrize("given", [["--token", TOKEN], []])
def test_command_evaluates_a_server_with_a_token(corridor, address, capsys, monkeypatch, given):  # noqa: F811
    monkeypatch.setenv("TORCHPI_TOKEN", "another" if given else TOKEN)
    out = evaluated(capsys, address, "--env", "corridor", "--workers", "1", *given)
    assert len(json.loads(out)["episodes"]) == 2
    assert json.loads(out)["policy"] == address
    assert TOKEN not in out


@pytest.mark.slow
def test_token_reaches_workers_outside_their_command_lines(policy, address, capsys, monkeypatch):
    require_simulator()
    infer_batch, commands = policy.infer_batch, {}

    def watched(*arguments, **options):
        for child in multiprocessing.active_children():
            commands[child.pid] = pathlib.Path(f"/proc/{child.pid}/cmdline").read_text()
        return infer_batch(*arguments, **options)

    monkeypatch.setattr(policy, "infer_batch", watched)
    arguments = ["--env", "metaworld", "--tasks", "faucet-open,faucet-close", "--workers", "2", "--token", TOKEN]
    assert len(json.loads(evaluated(capsys, address, *arguments))["episodes"]) == 2
    assert len(commands) == 2
    assert not any(TOKEN in command for command in commands.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--token", "wrong"], "does not accept the token"), ([], "requires a token, but none was given")],
)
def test_wrong_or_missing_token_prints_one_line(
    corridor,  # noqa: F811
    address,
    capsys,
    monkeypatch,
    given,
    message,
):
    monkeypatch.delenv("TORCHPI_TOKEN", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["eval", address, "--env", "corridor", "--workers", "1", *given])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (1, "")
    assert captured.err.startswith(f"error: {address} {message} (HTTP 401); expected the token that the server was")
    assert "--token, as TORCHPI_TOKEN in the environment" in captured.err
    assert captured.err.count("\n") == 1
    assert "wrong" not in captured.err


def test_token_without_a_server_is_an_error_unless_from_the_environment(corridor, policy, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match=r"for the address of a server, .* and demo is not one; leave it out"):
        quiet("demo", token=TOKEN)
    with pytest.raises(ValueError, match="this policy is loaded already; leave it out"):
        quiet(policy, token=TOKEN)
    monkeypatch.setenv("TORCHPI_TOKEN", TOKEN)
    main(["eval", "demo", "--env", "corridor", "--episodes", "1", "--max-steps", "1", "--workers", "1"])


# The command, and the simulator


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(folder):
    require_simulator()
    results = []
    for workers in (1, 2):
        result = quiet(folder, "metaworld", episodes=2, workers=workers, rollout=Rollout(max_steps=20, num_steps=2))
        results.append((result.episodes, result.tasks))
    assert results[0] == results[1]
    assert list(results[0][1]) == ["faucet-open", "faucet-close"]  # as its provenance says
    assert len(results[0][0]) == 4


def test_command_prints_one_json_document(folder, capsys):
    require_simulator()
    main([
        "eval", str(folder), "--env", "metaworld", "--episodes", "1", "--max-steps", "9", "--execute-steps", "3",
        "--num-steps", "1", "--workers", "1", "--swap", "faucet-open:faucet-close", "--blank-images", "--seed", "5",
        "--json",
    ])  # fmt: skip
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert "2/2" in captured.err
    assert document["success_rate"] == 0.0
    assert document["interval"] == pytest.approx(wilson_interval(0, 2))
    assert document["tasks"]["faucet-open"] == {
        "instruction": "close the faucet",
        "success_rate": 0.0,
        "interval": pytest.approx(list(wilson_interval(0, 1))),
        "episodes": 1,
        "mean_steps": None,
        "median_steps": None,
    }
    assert [(e["steps"], e["num_chunks"]) for e in document["episodes"]] == [(9, 3), (9, 3)]
    assert document["blank_images"] is True


def test_command_prints_a_table(folder, capsys):
    require_simulator()
    main([
        "eval", str(folder), "--env", "metaworld", "--tasks", "faucet-open", "--episodes", "1", "--max-steps", "2",
        "--workers", "1",
    ])  # fmt: skip
    assert "open the faucet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--env", "metaworld"], "There is no checkpoint at nowhere"),
        (["FOLDER", "--env", "libero"], "--env libero is not an environment; expected --env libero --suite"),
        (["FOLDER", "--env", "metaworld", "--tasks", "fly"], "metaworld has no task 'fly'; its tasks are assembly"),
        (["FOLDER", "--env", "aloha_sim"], "do not fit: the policy requires the cameras base, wrist"),
        (["FOLDER", "--env", "metaworld", "--videos", "1"], "Videos need a folder"),
        (
            ["FOLDER", "--env", "metaworld", "--tasks", "door-open", "--workers", "0"],
            "workers must be at least 1, got 0",
        ),
        (["FOLDER", "--env", "metaworld", "--tasks", "door-open", "--seed", "-1", "--dry-run"], "The seed is -1"),
        (
            ["FOLDER", "--env", "metaworld", "--tasks", "door-open", "--out", "FOLDER/policy.json/below"],
            "policy.json/below is a file, or below one; expected a folder to write into. Choose another one with --out",
        ),
    ],
)
def test_command_prints_one_line_for_an_invalid_argument(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["eval", *(argument.replace("FOLDER", str(folder)) for argument in arguments)])
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_command_without_opengl_names_the_packages(folder, workers):
    pytest.importorskip("metaworld", exc_type=ImportError)
    done = python(
        "-m", "torchpi.cli", "eval", folder, "--env", "metaworld", "--episodes", "2", "--workers", workers, "--json",
        MUJOCO_GL="off",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: episode ")
    assert "No OpenGL that renders without a screen (MUJOCO_GL=off: This turns rendering off)" in last
    if workers == "1":  # GLFW, which MuJoCo then imports, may complain when the other process is ended
        assert "Traceback" not in done.stderr


def test_command_without_the_extra_prints_the_install_command(folder):
    program = (
        "import sys; sys.modules['metaworld'] = None; from torchpi.cli import main; "
        f"main(['eval', {str(folder)!r}, '--env', 'metaworld', '--workers', '1'])"
    )
    done = python("-c", program)
    assert done.returncode == 1
    assert "Simulation needs the extra 'sim': pip install 'torchpi[sim]'" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
