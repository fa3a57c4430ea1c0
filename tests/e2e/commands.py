"""The documents' commands with less to do."""

import re
import shlex

SMALL_TRAINING = (
    "--num-steps 20 --batch-size 4 --num-draws 1 --warmup-steps 2 --holdout 0.3 --holdout-samples 4 --eval-every 20 "
    "--save-every 10 --log-every 5"
)


def shortened(line: str, *, tasks: str) -> list[str]:
    """The arguments of a command, without `torchpi`: recordings of `tasks`, one episode, few steps."""
    line = re.sub(r"checkpoints/\d+", "checkpoints/00000020", line)
    line = re.sub(r"--episodes \d+", "--episodes 1", line)
    line = re.sub(r"(sim record.*--tasks) \S+", rf"\1 {tasks}", line)
    arguments = shlex.split(line, comments=True)
    if arguments[0] == "train" and "--dataset" in arguments:
        arguments += SMALL_TRAINING.split()
    if arguments[0] == "eval":
        if "--max-steps" in arguments:
            at = arguments.index("--max-steps")
            del arguments[at : at + 2]
        arguments += ["--max-steps", "16"]
    return arguments
