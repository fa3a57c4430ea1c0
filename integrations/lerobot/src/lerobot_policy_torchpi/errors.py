"""The errors of this package: what failed, what was found, what was expected, what to do."""


class PluginError(ValueError):
    """Options, features or a batch of LeRobot do not fit the policy."""


class MissingKeyError(PluginError, KeyError):
    """A camera, the state or an option is missing."""

    def __str__(self) -> str:
        """The message without the quotes that a KeyError puts around it."""
        return str(self.args[0])
