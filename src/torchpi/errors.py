"""Errors for users, one class per subject, and helpers for their messages.

A message says what failed, what was found, what was expected and what to do. Each class also derives from a built-in
error; `TorchpiError` is the base of all.
"""

import difflib
import numbers
from collections.abc import Iterable, Sequence
from typing import Any


def first_of(texts: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """Join the first `limit` texts, made printable, and state how many more there are."""
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return f"{separator.join(map(printable, texts[:limit]))}{more}"


def printable(text: object, limit: int = 500, keep: str = "") -> str:
    """Make untrusted text safe for messages, logs and terminals: one line, of bounded length.

    Control characters, line breaks, changes of the writing direction and lone surrogates are escaped, except those in
    `keep`. If the text is longer than `limit` characters, its middle is left out.
    """
    result = str(text)
    if len(result) > limit:
        result = f"{result[: limit // 2]} … {result[len(result) - limit // 3 :]} ({len(result)} characters)"
    if result.isprintable():
        return result
    escaped = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in result)
    return "".join(escaped)[: 2 * limit]


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: `1 episode`, `2 episodes`."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def listed(names: Iterable[object], last: str = "and") -> str:
    """Names as in a sentence: `a`, `a and b`, `a, b and c`."""
    *others, end = [*map(str, names)] or [""]
    return f"{', '.join(others)} {last} {end}" if others else end


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar known name, ignoring case; None if none is similar."""
    by_lower = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suffix for an unknown name: ` (did you mean so101?)`; empty if none is similar."""
    close = closest(name, known)
    return f" (did you mean {close}?)" if close else ""


def is_whole(value: Any) -> bool:
    """True for integers, including NumPy's; not for bools, nor for 2.0."""
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
    """Actions are unsafe for the robot: not finite, or beyond its limits."""


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
    """A file or folder does not exist."""


class MissingExtraError(TorchpiError, ModuleNotFoundError):
    """An optional dependency is not installed."""
