"""The errors of users' mistakes: one class per subject, each of them the built-in error that it has always been;
phrases of their messages, and a check.

A message says what failed, what was found, what was expected and what to do. Catch `TorchpiError` for all of them.
"""

import difflib
import numbers
from collections.abc import Iterable, Sequence
from typing import Any


def first_of(texts: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """The first texts of many, printable, and how many there are more."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{separator.join(map(printable, texts[:most]))}{more}"


def printable(text: object, most: int = 500, keep: str = "") -> str:
    """Text from outside, for messages, logs and terminals: in one line, and of a bounded length.

    Control characters, line breaks, changes of the writing direction and lone surrogates are escaped, but for those in
    `keep`; of more than `most` characters the middle is left out.
    """
    found = str(text)
    if len(found) > most:
        found = f"{found[: most // 2]} … {found[len(found) - most // 3 :]} ({len(found)} characters)"
    if found.isprintable():
        return found
    escaped = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in found)
    return "".join(escaped)[: 2 * most]


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: `1 episode`, `2 episodes`."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Iterable[object], last: str = "and") -> str:
    """A list as a sentence has it: `a`, `a and b`, `a, b and c`."""
    *most, end = [*map(str, names)] or [""]
    return f"{', '.join(most)} {last} {end}" if most else end


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None: none is similar."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean so101?)`, behind an unknown name; empty where none is similar."""
    close = closest(name, known)
    return f" (did you mean {close}?)" if close else ""


def is_whole(value: Any) -> bool:
    """True for a whole number, NumPy's included; a bool is none, nor is 2.0."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class TorchpiError(Exception):
    """Base of the errors below."""


class ConfigError(TorchpiError, ValueError):
    """The sizes of a model, or a file about them, are not valid."""


class ModelError(TorchpiError, ValueError):
    """A tensor does not fit the model."""


class ObservationError(TorchpiError, ValueError):
    """A batch of observations is not valid."""


class TransformError(TorchpiError, ValueError):
    """An image, a state, a prompt or statistics can't be transformed."""


class EmbodimentError(TorchpiError, ValueError):
    """The description of a robot, or a robot's observation, is not valid."""


class CheckpointError(TorchpiError, ValueError):
    """A checkpoint can't be read or written."""


class PolicyError(TorchpiError, ValueError):
    """The parts of a policy, or the arguments of an inference, do not fit together."""


class ActionError(PolicyError):
    """Actions that no robot is to be sent: not finite, or beyond its limits."""


class DatasetError(TorchpiError, ValueError):
    """A dataset can't be read or written."""


class TrainingError(TorchpiError, ValueError):
    """A training recipe or run is not valid."""


class SimulationError(TorchpiError, ValueError):
    """A simulation can't run."""


class ServingError(TorchpiError, ValueError):
    """A server's settings or a message are not valid."""


class UsageError(TorchpiError, ValueError):
    """The options of a command, or a file given to it, are not valid."""


class UnknownKeyError(TorchpiError, KeyError):
    """A key is missing or unknown."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingFileError(TorchpiError, FileNotFoundError):
    """There is no such file or folder."""


class MissingExtraError(TorchpiError, ModuleNotFoundError):
    """An optional dependency is not installed."""
