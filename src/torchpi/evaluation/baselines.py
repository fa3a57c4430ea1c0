"""What a policy that knows nothing would predict: that the robot stays where it is."""

import numpy as np
from jaxtyping import Float

from torchpi.robots import Embodiment
from torchpi.robots.holding import holds


def held_actions(embodiment: Embodiment, state: np.ndarray) -> Float[np.ndarray, "F a"]:
    """The actions with which the robot stays in states [F, s]; NaN where `holds` is None."""
    actions = np.full((len(state), embodiment.action_size), np.nan)
    for i, hold in enumerate(holds(embodiment)):
        if hold is not None:
            actions[:, i] = 0.0 if hold.index is None else state[:, hold.index]
    return actions
