"""Errors of sensor messages."""


class UnusableError(Exception):
    """A message, or the current set of messages, can't be used for an observation; later ones may be usable."""
