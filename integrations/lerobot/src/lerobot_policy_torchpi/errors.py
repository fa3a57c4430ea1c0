"""Error classes of this package."""


class PluginError(ValueError):
    """Options, features or a batch of LeRobot do not fit the policy."""


class MissingKeyError(PluginError, KeyError):
    """A camera, the state or an option is missing."""

    def __str__(self) -> str:
        """Message without the quotes that KeyError adds."""
        return str(self.args[0])
