"""The refusal of chunks of which the policy is uncertain."""

from __future__ import annotations

import logging
import math
from typing import Any, Mapping

import numpy as np

from torchpi_client.report import ControlReport

_log = logging.getLogger(__name__)


class UncertaintyLimit:
    """Compares the uncertainty of each chunk with the limit, and logs when that is exceeded and when it ends."""

    def __init__(self, limit: float | None, policy: str, report: ControlReport) -> None:
        self._limit, self._policy, self._report = limit, policy, report
        self.exceeded = False
        """The last chunk was refused."""

    def read(self, answer: Mapping[str, Any]) -> float | None:
        """The answer's uncertainty; None: there is none, and none is needed.

        Raises:
            ValueError: there is none, or it is no number, and there is a limit.
        """
        value = answer.get("uncertainty")
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 <= value < math.inf:
            return float(value)
        if self._limit is None:
            return None
        found = "no uncertainty" if value is None else f"the uncertainty {value!r:.80}"
        raise ValueError(
            f"{self._policy} answered {found}, and max_uncertainty is {self._limit:g}; expected a number from 0 on: "
            "start the server with --num-samples 2 or more, or leave max_uncertainty out."
        )

    def refuses(self, answer: Mapping[str, Any]) -> bool:
        """Count the answer's uncertainty; True: it is above the limit."""
        value = self.read(answer)
        if value is None:
            return False
        self._report.uncertainty.add(value)
        above = self._limit is not None and value > self._limit
        if above and not self.exceeded:
            text = "%s is uncertain: %.3g is above max_uncertainty, %g; the robot is held until a chunk is not"
            _log.warning(text, self._policy, value, self._limit)
        elif self.exceeded and not above:
            _log.info("%s is certain again: %.3g is not above max_uncertainty", self._policy, value)
        self._report.uncertain_chunks += above
        self.exceeded = above
        return above
