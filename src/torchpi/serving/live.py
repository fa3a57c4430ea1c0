"""Live view of a server's requests and chunks in Rerun, or an .rrd file of them. Robots never wait for it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.extras import require
from torchpi_client.rerun_log import RerunLog, RobotLog


class LiveView:
    """Rerun log with one robot per client; entries carry the time of the answer. See `RerunLog`."""

    def __init__(self, target: str) -> None:
        require("rerun", "rerun")
        self._log = RerunLog(target)
        self._robots: dict[int, RobotLog] = {}

    def keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        """Show a client's request to policy `name` and its chunk [H, a]. Does not block."""
        if client not in self._robots:
            self._robots[client] = self._log.robot(policy.metadata, label=f"{name} {client}")
        robot, now = self._robots[client], self._log.seconds
        robot.observe(now, observation)
        robot.predict(now, actions)

    def end(self, client: int) -> None:
        """Forget a client that has left; its entries stay in the log."""
        self._robots.pop(client, None)

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()
