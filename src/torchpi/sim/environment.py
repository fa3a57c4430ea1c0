"""What a simulator has to offer, so that policies can be run in it and episodes recorded from it."""

from typing import Any, Protocol

import numpy as np

from torchpi.robots import Embodiment


class Environment(Protocol):
    """One task of a simulator, in one process. Rendering happens in `observe` and `render` only, never in `step`."""

    task: str
    """Its name, as `make_environment` takes it."""
    instruction: str
    """The text that tells a policy what to do; part of every observation."""
    embodiment: Embodiment
    """What the simulated robot sends and takes: the keys of `observe`, the dimensions of an action, the rate."""
    max_steps: int
    """Actions after which an episode has failed."""

    def reset(self, seed: int) -> None:
        """Begin an episode. The same seed gives the same episode, whatever happened before."""
        ...

    def observe(self) -> dict[str, Any]:
        """The robot's observation now, in the embodiment's keys; renders its cameras."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [a]; whether the task is done, as the simulator defines success.

        Raises:
            ValueError: the action is not [a], or not finite.
        """
        ...

    def expert_action(self) -> np.ndarray:
        """What the scripted expert does now, [a]; NotImplementedError where there is none."""
        ...

    def render(self, size: int) -> dict[str, np.ndarray]:
        """Each camera's view, uint8 [h, w, 3] with a height of `size`, for people to look at."""
        ...

    def close(self) -> None:
        """Free what the simulator holds."""
        ...


def check_action(action: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """The action as float64 [a].

    Raises:
        ValueError: it has another shape, or NaN or infinity in it.
    """
    array = np.asarray(action, np.float64)
    if array.shape != (embodiment.action_size,):
        raise ValueError(
            f"{embodiment.name} takes an action [{embodiment.action_size}] "
            f"({', '.join(dimension.name for dimension in embodiment.actions)}), got {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"there is NaN or infinity in the action {array.tolist()}; the simulator would break")
    return array
