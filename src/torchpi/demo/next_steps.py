"""Commands to try after the demo."""

import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Sequence

from torchpi.sim import simulator


def next_steps(env: str, tasks: Sequence[str], *, can_render: bool) -> list[tuple[str, str]]:
    """Descriptions and command lines of other commands to try.

    Args:
        tasks: tasks that the policy was trained on.
        can_render: whether there is a renderer, which most of the commands need.
    """
    trace = ("Show every tensor of the forward pass, from the images to the actions.", "trace demo --html trace.html")
    if not can_render:
        steps = [trace, ("Install the missing parts, and run episodes in the simulator.", "demo")]
    else:
        # A scene with two possible instructions shows best whether the policy follows them.
        faucets = ("faucet-open", "faucet-close")
        task, other = faucets if set(faucets) <= set(tasks) else (tasks[0], tasks[-1])
        instruction = shlex.quote(simulator(env).instructions[other])
        swap = f"--tasks {task},{other} --swap {task}:{other}"
        steps = [
            ("Give it another instruction.", f"demo --tasks {task} --instruction {instruction}"),
            trace,
            ("Measure it in more episodes.", f"eval demo --env {env} --episodes 20"),
            ("Swap two instructions: a policy that follows them does the wrong task.", f"eval demo --env {env} {swap}"),
            ("Record demonstrations by a scripted expert.", f"sim record --tasks {task} --episodes 50 --out recorded"),
            ("Train a policy on them.", "train --recipe metaworld --dataset recorded --out trained"),
        ]
    return [(text, f"{_program()} {arguments}") for text, arguments in steps]


def _program() -> str:
    """Name of the program if the shell finds it, otherwise its path."""
    program = pathlib.Path(sys.argv[0])
    if program.name != "torchpi" or shutil.which("torchpi"):
        return "torchpi"
    return shlex.quote(os.path.relpath(program))
