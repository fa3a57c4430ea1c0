"""Many clients at once, for some seconds, and what `torchpi bench serve` says of them."""

import json

import pytest

from torchpi.bench.serving import run_bench_serving


@pytest.mark.slow
def test_sixteen_clients_are_served_alike(capfd):
    run_bench_serving(
        model_ms=10.0, runs=3, requests=20, clients=16, seconds=8.0, guided=["tiny"], pairs=3, as_json=True
    )
    out, err = capfd.readouterr()
    assert "run 3 of 3" in err
    result = json.loads(out)

    assert len(result["runs"]) == 3
    for numbers in (result["overhead"], *result["runs"]):
        for name in ("server_ms", "loop_ms"):
            assert 0 < numbers[name]["p50"] <= numbers[name]["p95"] <= numbers[name]["p99"]
    ratios = sorted(run["server_ms"]["p50"] / run["loop_ms"]["p50"] for run in result["runs"])
    assert result["overhead"]["ratio"]["p50"] == pytest.approx(ratios[1])

    crowd = result["crowd"]
    assert crowd["errors"] == 0
    assert crowd["slowest_to_mean"] >= 0.5
    assert crowd["mean_batch"] > 2
    assert crowd["memory_growth_mb"] < 50

    (guided,) = result["guided"]
    assert guided["model"] == "tiny"
    assert guided["pairs"] == 3
    assert guided["ratio"] > 0
