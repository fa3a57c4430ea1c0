"""Many clients at once, for some seconds."""

import json

import pytest

from torchpi.bench.serving import run_bench_serving


@pytest.mark.slow
def test_sixteen_clients_are_served_alike(capsys):
    run_bench_serving(model_ms=10.0, clients=16, seconds=8.0, requests=100, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["errors"] == 0
    assert result["slowest_to_mean"] >= 0.5
    assert result["mean_batch"] > 2
    assert result["memory_growth_mb"] < 50
