"""Training in several processes, for the tests: `train_together` starts them, and they run this file.

A process does all jobs of a test one after the other, because its start takes longer than they do.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

import torch

from torchpi.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is begun, or gone on with."""

    config: TrainConfig
    run: pathlib.Path
    resume: bool = False


def train_together(world_size: int, jobs: Sequence[Job], folder: pathlib.Path) -> None:
    """Train in `world_size` new processes, as torchrun starts them.

    Args:
        folder: empty; for the processes' instructions and what they print.

    Raises:
        AssertionError: a process has failed; with what it has printed.
    """
    folder.mkdir()
    for number, job in enumerate(jobs):
        (folder / f"{number}.json").write_text(job.config.to_json())
    # A port for each job: what one has left with the store must not meet the next one.
    instructions = [[f"{folder / str(n)}.json", str(job.run), job.resume, free_port()] for n, job in enumerate(jobs)]
    (folder / "jobs.json").write_text(json.dumps(instructions))
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder / "jobs.json")]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text()[-6000:] for rank in range(world_size))


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resume(config: TrainConfig, run: pathlib.Path) -> None:
    """Go on with a run, or begin it where it has no checkpoint yet; quietly."""
    from torchpi.training import loop
    from torchpi.training.state import checkpoints

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    loop.train(config, run, resume=bool(checkpoints(run)))


def main() -> None:
    """Do the jobs of the file that is named on the command line."""
    from torchpi.training import loop

    for recipe, run, resume, port in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        loop.train(TrainConfig.from_json(recipe), pathlib.Path(run), resume=resume)


if __name__ == "__main__":
    main()
