"""Requests and chunks of a server in the viewer Rerun, live or as a file; robots never wait for it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.extras import require
from torchpi_client.rerun_log import RerunLog, RobotLog


class LiveView:
    """The robots of a server by client, at the times of their answers; see `RerunLog`."""

    def __init__(self, target: str) -> None:
        require("rerun", "rerun")
        self._log = RerunLog(target)
        self._robots: dict[int, RobotLog] = {}

    def keep(self, name: str, client: int, policy: Any, observation: Mapping[str, Any], actions: np.ndarray) -> None:
        """Show one request of a client to the policy of this name, and its chunk [H, a]; returns at once."""
        if client not in self._robots:
            self._robots[client] = self._log.robot(policy.metadata, label=f"{name} {client}")
        seen, now = self._robots[client], self._log.seconds
        seen.observe(now, observation)
        seen.predict(now, actions)

    def end(self, client: int) -> None:
        """Forget a client that has left; the file keeps it."""
        self._robots.pop(client, None)

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()
