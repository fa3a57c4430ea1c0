"""The command view."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Annotated, ClassVar

import tyro

from torchpi.atomic import atomic_file
from torchpi.cli.common import EpisodeOptions, Episodes, Load, SamplingOptions, refuse_changed
from torchpi.errors import UsageError, counted
from torchpi.extras import require


@dataclasses.dataclass(frozen=True)
class View:
    """Show recorded episodes in the viewer Rerun: cameras, state and actions over time, and what a policy predicts.

    The source is a LeRobot dataset, or what `torchpi serve --record` wrote. With --policy the chunks that it predicts
    are drawn over the recorded actions. Live robots: --rerun of `torchpi serve` and `torchpi demo`.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A LeRobot dataset or a server's recording: a folder, or hf://org/name[@revision]."""
    policy: str | None = None
    """A policy folder, a checkpoint, hf://…, gs://…, or "demo": predicts chunks along the episodes."""
    save: pathlib.Path | None = None
    """Write an .rrd file, which `rerun FILE` shows, in place of opening the viewer."""
    web: bool = False
    """Show it in a browser, at the address that is printed, in place of a window; Ctrl-C ends it."""
    port: int = 9090
    """Of --web."""
    stride: int = 1
    """Frames of the cameras from one that is shown to the next; numbers are shown of all frames."""
    every: int | None = None
    """Frames from one predicted chunk to the next; by default what the policy executes of a chunk, or half of it."""
    seed: int = 0
    """Seed of the predictions' noise."""
    recorded: Episodes = EpisodeOptions()
    load: Load = SamplingOptions()
    aliases: ClassVar = {"--episodes": "--select", "--out": "--save"}

    def run(self) -> None:
        self._check()
        require("rerun", "rerun")
        if self.save is not None:
            with atomic_file(self.save) as part:
                self._write(part)
            print(f"wrote {self.save}; show it with: rerun {self.save}")
            return
        with tempfile.TemporaryDirectory(prefix="torchpi-view-") as folder:
            file = pathlib.Path(folder) / "view.rrd"
            self._write(file)
            web = ["--web-viewer", "--web-viewer-port", str(self.port)] if self.web else []
            # Without --bind the viewer listens on every network of this machine.
            status = subprocess.run([sys.executable, "-m", "rerun", str(file), "--bind", "127.0.0.1", *web]).returncode
        if status:
            raise UsageError(f"The viewer ended with status {status}; --save FILE.rrd writes a file for another one.")

    def _check(self) -> None:
        source = pathlib.Path(self.source)
        if self.source == "demo" or any((source / name).exists() for name in ("policy.json", "config.json", "params")):
            raise UsageError(
                f"{self.source} is a policy, which is shown on recorded episodes: torchpi view DATASET --policy "
                f"{self.source}; the embedded one in simulation: torchpi demo --rerun demo.rrd."
            )
        if self.save is not None and (self.web or self.save.suffix != ".rrd"):
            raise UsageError(f"--save {self.save}: expected a file that ends in .rrd, and no --web.")
        has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if self.save is None and not self.web and not has_screen:
            raise UsageError("There is no screen here to open the viewer on; write a file, --save FILE.rrd, or --web.")
        if self.policy is None:
            refuse_changed(dataclasses.replace(self.load, embodiment=None), belongs_to="--policy")
            if self.every is not None:
                raise UsageError("--every can only be given with --policy.")

    def _write(self, target: pathlib.Path) -> None:
        from torchpi.evaluation.view import write_view
        from torchpi.policy import load_policy

        reading, load = self.recorded.reading_of(self.source), self.load.given()
        reading |= {"stride": self.stride, "every": self.every, "seed": self.seed, "embodiment": load.get("embodiment")}
        policy = None if self.policy is None else load_policy(self.policy, **load)
        dataset = write_view(self.source, target, policy=policy, **reading)
        print(f"{counted(len(dataset.episode_lengths), 'episode')}, {counted(len(dataset), 'frame')}", file=sys.stderr)
