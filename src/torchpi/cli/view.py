"""The view command."""

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
    """Show recorded episodes in the Rerun viewer: cameras, state and actions over time, and a policy's predictions.

    The source is a LeRobot dataset or a recording of `torchpi serve --record`. With --policy, predicted action chunks
    are drawn over the recorded actions. For a live view, use --rerun of `torchpi serve` or `torchpi demo`.
    """

    source: Annotated[str, tyro.conf.Positional]
    """LeRobot dataset or server recording: a folder, or hf://org/name[@revision]."""
    policy: str | None = None
    """Policy that predicts chunks along the episodes: a policy folder, a checkpoint, hf://…, gs://…, or "demo"."""
    save: pathlib.Path | None = None
    """Write an .rrd file instead of opening the viewer; show it with `rerun FILE`."""
    web: bool = False
    """Show the viewer in a browser, at the printed address, instead of a window; Ctrl-C stops it."""
    port: int = 9090
    """Port of the web viewer."""
    stride: int = 1
    """Show every n-th camera frame; states and actions are shown for all frames."""
    every: int | None = None
    """Frames between two predicted chunks; by default as many as the policy executes, or half a chunk."""
    seed: int = 0
    """Random seed for the noise of the predictions."""
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
            # Without --bind the viewer listens on all network interfaces.
            status = subprocess.run([sys.executable, "-m", "rerun", str(file), "--bind", "127.0.0.1", *web]).returncode
        if status:
            raise UsageError(f"The viewer exited with status {status}; write a file instead with --save FILE.rrd.")

    def _check(self) -> None:
        source = pathlib.Path(self.source)
        if self.source == "demo" or any((source / name).exists() for name in ("policy.json", "config.json", "params")):
            raise UsageError(
                f"{self.source} is a policy, not a dataset. Show it on recorded episodes with torchpi view DATASET "
                f"--policy {self.source}, or the embedded policy in simulation with torchpi demo --rerun demo.rrd."
            )
        if self.save is not None and (self.web or self.save.suffix != ".rrd"):
            raise UsageError(f"--save {self.save}: expected a file that ends in .rrd, and no --web.")
        has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if self.save is None and not self.web and not has_screen:
            raise UsageError("There is no display for the viewer; use --save FILE.rrd or --web.")
        if self.policy is None:
            refuse_changed(dataclasses.replace(self.load, embodiment=None), belongs_to="--policy")
            if self.every is not None:
                raise UsageError("--every can only be given with --policy.")

    def _write(self, target: pathlib.Path) -> None:
        from torchpi.evaluation.view import write_view
        from torchpi.policy import load_policy

        load = self.load.given()
        policy = None if self.policy is None else load_policy(self.policy, **load)
        dataset = write_view(
            self.source,
            target,
            policy=policy,
            stride=self.stride,
            every=self.every,
            seed=self.seed,
            embodiment=load.get("embodiment"),
            **self.recorded.episode_args(self.source),
        )
        print(f"{counted(len(dataset.episode_lengths), 'episode')}, {counted(len(dataset), 'frame')}", file=sys.stderr)
