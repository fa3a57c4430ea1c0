"""Many clients at once, for some seconds, and what `torchpi bench serve` says of them."""

import json

import pytest

from torchpi.bench.serve import run_bench_serving


@pytest.mark.slow
def test_sixteen_clients_are_served_alike(capfd):
    run_bench_serving(model_ms=10.0, runs=3, requests=20, clients=16, seconds=8.0, as_json=True)
    out, err = capfd.readouterr()
    assert "run 3 of 3" in err
    result = json.loads(out)

    assert len(result["runs"]) == 3
    for numbers in (result["overhead"], *result["runs"]):
        for name in ("server_ms", "minimal_ms"):
            assert 0 < numbers[name]["p50"] <= numbers[name]["p95"] <= numbers[name]["p99"]
    ratios = sorted(run["server_ms"]["p50"] / run["minimal_ms"]["p50"] for run in result["runs"])
    assert result["overhead"]["ratio"]["p50"] == pytest.approx(ratios[1])

    load = result["load"]
    assert load["errors"] == 0
    assert load["slowest_to_mean"] >= 0.5
    assert load["mean_batch"] > 2
    assert load["memory_growth_mb"] < 50
