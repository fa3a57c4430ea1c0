"""Errors of sensor messages."""


class UnusableError(Exception):
    """No observation can be made of a message, or of the messages that there are, at the moment; the next may do."""
