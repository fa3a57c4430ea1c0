"""`torchpi doctor`: what a policy is, whether its statistics are sound, and what it makes of an observation."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console

from torchpi.arrays import read_npz
from torchpi.doctor.description import describe
from torchpi.doctor.observation import Sampling, check_observation
from torchpi.doctor.report import print_diagnosis
from torchpi.doctor.result import Diagnosis, Finding
from torchpi.doctor.statistics import check_statistics
from torchpi.policy import Policy, load_policy

__all__ = ["Diagnosis", "Finding", "diagnose", "run_doctor"]

_LEVELS = ("problem", "warning", "note")


def diagnose(
    policy: Policy,
    observation: Mapping[str, Any] | None = None,
    *,
    num_seeds: int = 8,
    num_steps: int = 10,
    seed: int = 0,
    other_instruction: str | None = None,
) -> Diagnosis:
    """Examine a policy; nothing about it is changed.

    Args:
        observation: of its robot, nested, or flat with '.' between the keys; None: only what needs no observation.
        num_seeds: noises, each with its own chunk.
        num_steps: Euler steps.
        seed: of the noises.
        other_instruction: what the instruction is replaced by; by default another one that the policy was trained with,
            or a made-up one.

    Returns:
        What the policy is, findings, and what the observation shows. An observation that the policy cannot read is a
        finding, not an error.
    """
    sampling = Sampling(num_seeds, num_steps, seed, other_instruction)
    of_weights = list(_check_weights(policy))
    findings = [*of_weights, *check_statistics(policy)]
    checks = None
    if observation is not None:
        checks, found = check_observation(policy, observation, sampling, run=not of_weights)
        findings += found
    findings.sort(key=lambda finding: _LEVELS.index(finding.level))
    return Diagnosis(describe(policy), tuple(findings), checks)


def _check_weights(policy: Policy) -> Iterator[Finding]:
    broken = [name for name, weight in policy.model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        yield Finding(
            "problem",
            "weights",
            f"NaN or infinity in {', '.join(broken[:5])}{more}; expected finite numbers. Get the file again; if the "
            "weights come out of a training run, take an earlier checkpoint of it.",
        )


def run_doctor(path: str, *, observation: pathlib.Path | None = None, as_json: bool = False, **load: Any) -> int:
    """Examine a policy and print what there is to say.

    Args:
        path: of the policy, as `load_policy` takes it.
        observation: an .npz file with the robot's own keys, nested ones joined with '.', as for `torchpi infer`.
        as_json: print one JSON document on stdout, and all else on stderr.
        load: further arguments of `load_policy`, for checkpoints that do not say everything.

    Returns:
        The exit status: 1 if there is a problem, else 0.
    """
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        request = None if observation is None else read_npz(observation)
        policy = load_policy(path, **load)
        diagnosis = diagnose(policy, request)
    if as_json:
        print(json.dumps(diagnosis.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        # Plain text: names and prompts come from files, and "[4, 200]" is no markup.
        console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
        print_diagnosis(policy, diagnosis, console, title=str(path))
    return diagnosis.status
