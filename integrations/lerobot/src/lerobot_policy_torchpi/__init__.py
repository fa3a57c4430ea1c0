"""torchpi's policies in LeRobot: `torchpi` runs in the process, `torchpi_remote` asks a policy server.

LeRobot imports this package at its start, which registers the two; neither torchpi nor torchpi_client is imported then.
"""

import re
from importlib import metadata

from lerobot_policy_torchpi.version import __version__

FIRST, BEFORE = (0, 6, 1), (0, 7, 0)
"""The versions of LeRobot whose interface this is written for: FIRST ≤ version < BEFORE."""


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
            f"found {found}, so the policies torchpi and torchpi_remote are not registered. Install one that fits: "
            f"pip install 'lerobot>={_text(FIRST)},<{_text(BEFORE)}' (Python 3.12 or newer)."
        )


_require_lerobot()

from lerobot_policy_torchpi.configuration_torchpi import TorchpiConfig  # noqa: E402
from lerobot_policy_torchpi.configuration_torchpi_remote import TorchpiRemoteConfig  # noqa: E402

__all__ = ["TorchpiConfig", "TorchpiRemoteConfig", "__version__"]
