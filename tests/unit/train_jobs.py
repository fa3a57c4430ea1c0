"""Training in several processes for tests: `train_together` starts the processes, which run this file.

Each process runs all jobs of a test one after the other, because starting a process takes longer than a job.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from torchpi.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to start or resume."""

    config: TrainConfig
    run: pathlib.Path
    resume: bool = False


def train_together(world_size: int, jobs: Sequence[Job], folder: pathlib.Path) -> None:
    """Train in `world_size` new processes, as torchrun starts them.

    Args:
        folder: a new folder for the processes' instructions and output.

    Raises:
        AssertionError: a process has failed; the message has the processes' output.
    """
    folder.mkdir()
    # Each job needs a new store. The stores are served here, like torchrun does it: if the processes opened a port that
    # was found free before, another test could have taken it meanwhile, and both would wait forever.
    patience = datetime.timedelta(minutes=5)
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, patience, wait_for_workers=False) for _ in jobs]
    instructions = []
    for number, (job, store) in enumerate(zip(jobs, stores, strict=True)):
        recipe = folder / f"{number}.json"
        recipe.write_text(job.config.to_json())
        instructions.append([str(recipe), str(job.run), job.resume, store.port])
    (folder / "jobs.json").write_text(json.dumps(instructions))
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder / "jobs.json")]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        time.sleep(0.01)
    for process in processes:  # if one has failed, the others wait for it
        process.kill()
        process.wait()
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text()[-6000:] for rank in range(world_size))


def resume(config: TrainConfig, run: pathlib.Path) -> None:
    """Resume a run, or start it if it has no checkpoint yet, without output."""
    from torchpi.training import loop
    from torchpi.training.state import checkpoints

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    loop.train(config, run, resume=bool(checkpoints(run)))


def main() -> None:
    """Run the jobs of the file named on the command line."""
    from torchpi.training import loop

    for recipe, run, resume, port in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        loop.train(TrainConfig.from_json(recipe), pathlib.Path(run), resume=resume)


if __name__ == "__main__":
    main()
