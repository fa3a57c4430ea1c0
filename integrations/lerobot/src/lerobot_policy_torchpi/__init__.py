"""torchpi's policies in LeRobot: `torchpi` runs in the process, `torchpi_remote` uses a policy server.

LeRobot imports this package at its start, which registers both types without importing torchpi or torchpi_client.
"""

import re
from importlib import metadata

from lerobot_policy_torchpi.version import __version__

FIRST, BEFORE = (0, 6, 1), (0, 7, 0)
"""Supported versions of LeRobot: FIRST ≤ version < BEFORE."""


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _require_lerobot() -> None:
    try:
        found = metadata.version("lerobot")
    except metadata.PackageNotFoundError:
        found = "none"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not FIRST <= numbers < BEFORE:
        raise ImportError(
            f"lerobot_policy_torchpi {__version__} works with LeRobot from {_text(FIRST)} to before {_text(BEFORE)}; "
            f"found {found}, so the policies torchpi and torchpi_remote are not registered. Install a supported "
            f"version: pip install 'lerobot>={_text(FIRST)},<{_text(BEFORE)}' (Python 3.12 or newer)."
        )


_require_lerobot()

from lerobot_policy_torchpi.configuration_torchpi import TorchpiConfig  # noqa: E402
from lerobot_policy_torchpi.configuration_torchpi_remote import TorchpiRemoteConfig  # noqa: E402

__all__ = ["TorchpiConfig", "TorchpiRemoteConfig", "__version__"]
