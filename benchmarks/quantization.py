"""Closed-loop success of a policy unquantized and quantized, with the same episodes and noise, simulated on the CPU.

    python benchmarks/quantization.py OUT [--episodes 50] [--policy demo] [--dataset D] [--workers N]

fp8 is emulated with the rounding of a GPU's matmuls, and calibrated on 64 observations of a dataset, by default of
demonstrations recorded in OUT. OUT/results.json has every episode, OUT/results.md the table. Variants with a result in
OUT are not run again; delete the result to repeat them.
"""

import dataclasses
import json
import pathlib
from typing import Any

import tyro

from torchpi.evaluation.quantization import quantize_policy
from torchpi.policy import load_policy
from torchpi.sim.evaluate import evaluate
from torchpi.sim.record import record

VARIANTS = ("plain", "fp8", "int8")
DEMONSTRATIONS = 4


@dataclasses.dataclass(frozen=True)
class Study:
    """Arguments of the script."""

    out: tyro.conf.Positional[pathlib.Path]
    """Folder of the quantized policies and the results."""
    policy: str = "demo"
    """Policy, which states its training tasks."""
    env: str = "metaworld"
    """Simulator."""
    episodes: int = 50
    """Episodes per task."""
    seed: int = 0
    """Seed of the episodes, their noise and the calibration."""
    dataset: str | None = None
    """LeRobot dataset to calibrate fp8 on; by default demonstrations are recorded."""
    workers: int | None = None
    """Number of processes; by default one per core."""


def main(study: Study) -> None:
    """Quantize, evaluate, and write the results."""
    study.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for variant in VARIANTS:
        file = study.out / f"{variant}.json"
        if not file.exists():
            result = evaluate(
                prepared(study, variant),
                study.env,
                episodes=study.episodes,
                seed=study.seed,
                workers=study.workers,
                load={"device": "cpu"},
            )
            file.write_text(json.dumps(result.to_dict()) + "\n", encoding="utf-8")
        results[variant] = json.loads(file.read_text(encoding="utf-8"))
    settings = {"policy": study.policy, "env": study.env, "episodes_per_task": study.episodes, "seed": study.seed}
    (study.out / "results.json").write_text(json.dumps(settings | {"variants": results}) + "\n", encoding="utf-8")
    table = markdown(results)
    (study.out / "results.md").write_text(table, encoding="utf-8")
    print(table, end="")


def prepared(study: Study, variant: str) -> str | pathlib.Path:
    """Return a variant's policy; quantize it if needed."""
    if variant == "plain":
        return study.policy
    folder = study.out / f"policy_{variant}"
    if not folder.exists():
        dataset = None if variant == "int8" else demonstrations(study)
        quantize_policy(study.policy, folder, variant, dataset=dataset, seed=study.seed, load={"device": "cpu"})
    return folder


def demonstrations(study: Study) -> str | pathlib.Path:
    """Return the calibration dataset; record it if needed."""
    if study.dataset is not None:
        return study.dataset
    path = study.out / "demonstrations"
    if not path.exists():
        tasks = load_policy(study.policy, device="cpu").provenance["tasks"]
        record(study.env, list(tasks), DEMONSTRATIONS, path, workers=study.workers)
    return path


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Markdown table of success rates with Wilson's 95 % intervals, and of episodes in which a variant differs."""
    plain = results["plain"]
    lines = [f"| task | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    for task in plain["tasks"]:
        rates = [rate(result["tasks"][task]) for result in results.values()]
        lines.append(f"| {task} | {' | '.join(rates)} |")
    lines.append(f"| all | {' | '.join(map(rate, results.values()))} |")
    gained = {name: changed(result, plain) for name, result in results.items()}
    lines.append(f"| episodes that only this variant solves, that only plain solves | {' | '.join(gained.values())} |")
    return "\n".join(lines) + "\n"


def rate(result: dict[str, Any]) -> str:
    """Success rate with its interval, in percent."""
    low, high = result["interval"]
    return f"{result['success_rate']:.0%} ({low:.0%} to {high:.0%})"


def changed(result: dict[str, Any], plain: dict[str, Any]) -> str:
    """Numbers of episodes that only this variant solves, and that only the unquantized policy solves."""
    pairs = [
        (one["success"], other["success"]) for one, other in zip(result["episodes"], plain["episodes"], strict=True)
    ]
    assert [e["seed"] for e in result["episodes"]] == [e["seed"] for e in plain["episodes"]]
    return f"{pairs.count((True, False))}, {pairs.count((False, True))}"


if __name__ == "__main__":
    main(tyro.cli(Study))
