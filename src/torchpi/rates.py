"""Success rates with confidence intervals."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torchpi.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Rate:
    """A success rate with its confidence interval."""

    success_rate: float
    """From 0 to 1."""
    interval: tuple[float, float]
    """Wilson's 95 % interval."""
    episodes: int

    @classmethod
    def of(cls, successes: int, episodes: int) -> "Rate":
        """Compute rate and interval from counts."""
        return cls(successes / episodes, wilson_interval(successes, episodes), episodes)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Rate":
        """Parse an entry of `torchpi eval --json`; raises KeyError, TypeError or ValueError if it is malformed."""
        low, high = map(float, entry["interval"])
        return cls(float(entry["success_rate"]), (low, high), int(entry["episodes"]))

    def __str__(self) -> str:
        successes, (low, high) = round(self.success_rate * self.episodes), self.interval
        return f"{self.success_rate:.0%} ({low:.0%} – {high:.0%}), {successes} of {self.episodes}"


def rates_of(results: Any, where: str) -> dict[str, Rate]:
    """Parse the success rates per task from the output of `torchpi eval --json`.

    Args:
        where: name of the document, for the error message.
    """
    try:
        return {task: Rate.from_json(entry) for task, entry in results["tasks"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is not an output of `torchpi eval --json`: expected tasks by name, each with success_rate, "
            f"interval and episodes ({type(error).__name__}: {error})."
        ) from error


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a success rate, clipped to [0, 1].

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    z = 1.959963984540054  # 97.5 % of the standard normal distribution lie below it
    rate, spread = successes / episodes, z * z / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / episodes + spread / episodes / 4)
    # At 0 % and 100 % one end is exactly 0 or 1, which rounding would miss.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == episodes else centre + half)
