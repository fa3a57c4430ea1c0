"""Refusal of uncertain chunks."""

from __future__ import annotations

import logging
import math
from typing import Any, Mapping

import numpy as np

from torchpi_client.report import ControlReport

_log = logging.getLogger(__name__)


class UncertaintyLimit:
    """Compares the uncertainty of each chunk with a limit. Logs when it exceeds the limit, and when that ends."""

    def __init__(self, limit: float | None, policy: str, report: ControlReport) -> None:
        self._limit, self._policy, self._report = limit, policy, report
        self.exceeded = False
        """True if the last chunk was refused."""

    def read(self, answer: Mapping[str, Any]) -> float | None:
        """The answer's uncertainty, or None if it has none.

        Raises:
            ValueError: there is a limit, but the answer has no valid uncertainty.
        """
        value = answer.get("uncertainty")
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 <= value < math.inf:
            return float(value)
        if self._limit is None:
            return None
        found = "no uncertainty" if value is None else f"the uncertainty {value!r:.80}"
        raise ValueError(
            f"{self._policy} answered {found}, but max_uncertainty is {self._limit:g}; expected a number of 0 or more: "
            "start the server with --num-samples 2 or more, or leave max_uncertainty out."
        )

    def refuses(self, answer: Mapping[str, Any]) -> bool:
        """Count the answer's uncertainty; True if it is above the limit."""
        value = self.read(answer)
        if value is None:
            return False
        self._report.uncertainty.add(value)
        above = self._limit is not None and value > self._limit
        if above and not self.exceeded:
            text = "%s is uncertain: %.3g is above max_uncertainty, %g; the robot is held until a chunk is below it"
            _log.warning(text, self._policy, value, self._limit)
        elif self.exceeded and not above:
            _log.info("%s is certain again: %.3g is not above max_uncertainty", self._policy, value)
        self._report.uncertain_chunks += above
        self.exceeded = above
        return above
