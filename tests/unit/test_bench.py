"""Benchmarks of model, training and loading: floors count the operations that run."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torchpi
from torchpi.bench import floor
from torchpi.bench import model as bench
from torchpi.cli import main
from torchpi.config import preset
from torchpi.model import operations


def workload(config, **changes):
    return operations.Workload(
        **{"config": config, "batch": 1, "num_cameras": 3, "prompt_tokens": 40, "num_steps": 3, "dtype": torch.float32}
        | changes
    )


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize("batch", [1, 2])
def test_counted_flops_equal_those_of_a_run(batch, pi05):
    """PyTorch's FLOP counter sees every matmul of a run, including attention as plain matmuls."""
    work = workload(dataclasses.replace(preset("tiny"), pi05=pi05), batch=batch)
    model = torchpi.Pi0(work.config)
    observation = bench.make_observation(work, torch.device("cpu"))
    noise = torch.zeros(batch, work.config.action_horizon, work.config.action_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.sample_actions(observation, noise=noise, num_steps=work.num_steps)
    assert sum(op.flops for op in operations.sampling_ops(work)) == counter.get_total_flops()


@pytest.mark.parametrize("engine", [None, "eager"])
def test_sampling_is_also_measured_on_busy_cores(engine, monkeypatch):
    monkeypatch.setattr(floor, "measure_machine", lambda dtype, device: lambda: operations.Machine(1e11, 1e10))
    work = workload(preset("tiny"), num_steps=1)
    result = bench.bench_model(work, repeats=1, engine=engine, busy=True)
    assert result.to_json()["busy_seconds"] > 0
    assert "busy_seconds" not in bench.bench_model(work, repeats=1, engine=engine).to_json()


def test_batch_without_engine_bucket_is_an_error():
    with pytest.raises(ValueError, match="no bucket for this batch size"):
        bench.bench_model(workload(preset("tiny"), batch=9, num_steps=1), repeats=1, engine="eager")


def test_compile_option_of_bench_model_names_the_engine_option(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "model", "--compile"])
    assert "use --engine compiled with bench model" in capsys.readouterr().err


def test_compile_reaches_every_trained_layer(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    monkeypatch.setattr(floor, "measure_machine", lambda dtype, device: lambda: operations.Machine(1e11, 1e10))
    work = workload(preset("tiny"), num_steps=1)
    bench.bench_train(work, repeats=1)
    assert not compiled
    bench.bench_train(work, repeats=1, compiled=True)
    assert len(compiled) == 4 + 3 + 4  # the backbone's last layer computes only keys and values


def test_full_size_flops():
    """Expected at three cameras and 200 tokens: vision 0.66, prefix 3.76, expert 0.39 TFLOP."""
    work = workload(preset("pi05"), prompt_tokens=200, num_steps=10, dtype=torch.bfloat16)
    parts = (operations.vision_ops(work), operations.prefix_ops(work), operations.expert_ops(work, work.num_steps))
    assert [round(sum(op.flops for op in ops) / 1e12, 2) for ops in parts] == [0.66, 3.76, 0.39]


def test_floor_is_the_larger_of_compute_and_bytes():
    machine = operations.Machine(flops=10.0, bytes=5.0)
    assert operations.Op("matmul", flops=100, bytes=5).floor(machine) == 10
    assert operations.Op("copy", flops=0, bytes=50).floor(machine) == 10


def test_json_is_one_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(floor, "measure_machine", lambda dtype, device: lambda: operations.Machine(1e11, 1e10))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(preset("tiny").to_dict()))
    main(["bench", "--config", str(config), "--prompt-tokens", "10", "--repeats", "1", "--num-steps", "1", "--json"])
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [result["name"] for result in results] == ["sample_actions", "training step"]
    for result in results:
        assert result["ratio"] == pytest.approx(result["seconds"] / result["floor"])
    assert "prefix mlp" in captured.err


@pytest.mark.slow
def test_load_runs_in_a_fresh_process(tmp_path, capsys):
    torchpi.load_policy("demo", device="cpu").save(tmp_path / "policy")
    main(["bench", "load", "--policy", str(tmp_path / "policy"), "--json"])
    result = json.loads(capsys.readouterr().out)
    size = sum(p.nbytes for p in torchpi.Pi0(preset("tiny"), device="meta").parameters())
    assert (result["load"]["model_bytes"], result["convert"]["model_bytes"]) == (size, size)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "positive"),
        (["--prompt-tokens", "201"], "max_token_len 200"),
        (["--config", "nope.json"], "--config nope.json is neither a file nor a preset"),
        (["--config", "tinny"], "--config tinny is neither a file nor a preset; presets are mid, pi0, pi05, tiny"),
        (["load", "--policy", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options_print_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
