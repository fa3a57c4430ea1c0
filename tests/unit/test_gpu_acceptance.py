"""benchmarks/gpu_acceptance.py on a CPU, and the count of launches per sampling."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_acceptance
import gpu_checks
import gpu_launches
import gpu_report
import pytest
import torch

from torchpi.config import preset
from torchpi.engine import InferenceEngine
from torchpi.model.operations import Workload

BENCHMARKS = pathlib.Path(gpu_acceptance.__file__).parent
CPU = torch.device("cpu")
ENGINE_LAYERS = {"backbone": 9, "expert": 8}
"""Launches per engine layer, as in docs/kernels.md."""


def part(seconds=60.0):
    return gpu_acceptance.Part(CPU, gpu_checks.SMALL, time.time() + seconds)


@pytest.mark.slow
def test_script_runs_completely_on_a_cpu(tmp_path):
    assert gpu_acceptance.main(device="cpu", config="small", out=tmp_path / "found") == 0
    document = json.loads((tmp_path / "found.json").read_text())
    rows = document["rows"]
    assert {row["part"] for row in rows} == set(gpu_acceptance.PARTS)
    assert [row["check"] for row in rows if "skipped" in row] == ["Triton kernels"]
    assert document["summary"]["failed"] == 0
    assert document["summary"]["passed"] >= 15
    plain = [row for row in rows if row["part"] == "sampling" and row.get("kind") == "plain"]
    assert {row["mode"] for row in plain} == {"eager", "engine"}
    for row in plain:
        assert row["p99_ms"] >= row["p50_ms"] > row["vision_ms"] > 0
        assert row["ratio"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
    for row in (row for row in rows if row["part"] == "training"):
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["plan_bytes"] > 0
    text = (tmp_path / "found.md").read_text()
    for title in ("Checks", "Sampling", "Training", "Loading", "Launches per sampling"):
        assert f"### {title}\n\n" in text
    assert "| eager | plain | 3 + 200 | guidance |" in text
    assert "| `triton attend` | 0 | 32 |" in text  # 3 layers in 10 steps, and 2 in the prefix
    assert "FAILED" not in text


def test_missing_cuda_device_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="No CUDA device was found for --device cuda"):
        gpu_acceptance.main()


def test_wrong_actions_of_an_engine_are_a_failed_check(monkeypatch):
    sample = InferenceEngine.sample_actions
    monkeypatch.setattr(InferenceEngine, "sample_actions", lambda *args, **kw: sample(*args, **kw) + 0.01)
    checks = [
        check for check in gpu_checks.engine_checks(CPU, ("eager",)) if "batch" in check[0] or "threads" in check[0]
    ]
    rows = list(gpu_acceptance.run_checks(part(), iter(checks)))
    assert len(rows) == 9
    assert all(gpu_report.is_failure(row) for row in rows)


def test_wrong_gradients_and_numbers_that_are_not_finite_are_failed_checks():
    here, there = (gpu_checks.Samples.make(CPU).model for _ in range(2))
    assert gpu_checks._gradients(here, there)[0] == 0
    with torch.no_grad():
        there.expert.layers[0].attention.out.weight[0] += 0.1
    found, tolerance = gpu_checks._gradients(here, there)
    assert found > tolerance
    found = gpu_checks.difference(torch.tensor([float("nan")]), torch.ones(1))
    row = {"difference": found, "passed": found <= 1}
    assert gpu_report.is_failure(row)


def test_row_without_time_is_skipped_and_errors_are_rows():
    assert "left" in part(seconds=1).row({}, lambda: {"figure": 1}, needs=2)["skipped"]

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    row = part().row({"batch": 32}, no_memory, needs=0)
    assert row["out_of_memory"] == "CUDA out of memory"
    assert not gpu_report.is_failure(row)
    row = part().row({}, lambda: {}[0], needs=0)
    assert row["error"] == "KeyError: 0"
    assert gpu_report.is_failure(row)


@pytest.mark.slow
def test_isolated_part_is_stopped_at_its_deadline(tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    gpu_acceptance.run_isolated("training checks", "cpu", "small", time.time() + 60, rows)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["passed"] for row in found] == [True] * 4
    monkeypatch.setattr(gpu_acceptance, "GRACE", 0.01)
    gpu_acceptance.run_isolated("training checks", "cpu", "small", time.time(), rows)
    last = json.loads(rows.read_text().splitlines()[-1])
    assert last == {"part": "training checks", "check": "the rest", "skipped": "the part's time was exceeded"}
    # An error in the script itself.
    gpu_acceptance.run_isolated("no such part", "cpu", "small", time.time() + 60, rows)
    assert "ended with status" in json.loads(rows.read_text().splitlines()[-1])["error"]


@pytest.mark.slow
def test_kernel_checks_pass_in_the_interpreter():
    pytest.importorskip("triton")
    program = (
        "import torch, gpu_checks\n"
        "for name, check in gpu_checks.kernel_checks(torch.device('cpu'), False):\n"
        "    difference, tolerance = check()\n"
        "    assert difference <= tolerance, (name, difference)\n"
        "    print(name)\n"
    )
    paths = os.pathsep.join([str(BENCHMARKS), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {line.partition(",")[0] for line in done.stdout.splitlines()}
    fields = {field.name for field in dataclasses.fields(gpu_launches.Kernels)} - {"name"}
    assert names == fields


def workload(config, num_steps=10):
    return Workload(config, 1, 3, 200, num_steps, torch.bfloat16)


@pytest.mark.slow
def test_engine_needs_at_most_2000_launches_at_full_size():
    total, by_operation = gpu_launches.count_launches(workload(preset("pi05")), engine=True)
    assert total <= gpu_report.TARGET_LAUNCHES
    assert total == sum(by_operation.values())


@pytest.mark.slow
def test_fp8_engine_needs_at_most_2000_launches_at_full_size():
    total, by_operation = gpu_launches.count_launches(workload(preset("pi05")), engine=True, fp8=True)
    assert total <= gpu_report.TARGET_LAUNCHES
    assert by_operation["_scaled_mm"] == 27 * 4 + 17 * 4 + 1 + 180 * 3  # and gate-up in linear_geglu


@pytest.mark.slow
def test_action_prefix_needs_at_most_2000_launches_and_the_plain_model_five_times_as_many():
    work = workload(preset("pi05"))
    assert gpu_launches.count_launches(work, engine=True, action_prefix=True)[0] <= gpu_report.TARGET_LAUNCHES
    assert gpu_launches.count_launches(work, engine=False)[0] > 5 * gpu_report.TARGET_LAUNCHES


def test_launches_per_layer_match_the_documentation():
    config, count = gpu_checks.SMALL, {}
    for depth in (3, 4):
        for num_steps in (1, 2):
            stacks = {
                name: dataclasses.replace(getattr(config, name), depth=depth)
                for name in ("paligemma_variant", "action_expert_variant")
            }
            work = workload(dataclasses.replace(config, **stacks), num_steps)
            count[depth, num_steps] = gpu_launches.count_launches(work, engine=True)[0]
    layer = count[4, 1] - count[3, 1]
    assert layer == ENGINE_LAYERS["backbone"] + ENGINE_LAYERS["expert"]
    assert count[4, 2] - count[3, 2] == layer + ENGINE_LAYERS["expert"]


def test_operations_count_as_launches_but_views_and_allocations_do_not():
    x = torch.ones(4, 6)
    with gpu_launches.LaunchCounter("cpu") as counter:
        x.t().reshape(3, 2, 4)[0].unsqueeze(0).expand(5, 2, 4).detach()
        torch.empty_like(x)
        assert counter.total == 0
        y = x + 1
        y.mul_(2)
        y[0].copy_(x[1])
        y.sum().item()
    assert counter.counts == {"add": 1, "mul_": 1, "copy_": 1, "sum": 1}
