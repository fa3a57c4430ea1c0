"""Steps from a robot's observation to the loss and the actions, defined in assets/steps.toml."""

import dataclasses
import re
from collections.abc import Mapping

import msgspec

from torchpi.assets import assets


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the forward pass; the fields are explained in assets/steps.toml."""

    id: str
    title: str
    text: str
    text_pi0: str = ""
    color: str = "prefix"
    joint: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    formulas: Mapping[str, str] = dataclasses.field(default_factory=dict)
    formulas_pi05: Mapping[str, str] = dataclasses.field(default_factory=dict)
    formulas_pi0: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def explanation(self, pi05: bool) -> str:
        """One-line explanation for a variant."""
        return self.text if pi05 or not self.text_pi0 else self.text_pi0


STEPS: tuple[Step, ...] = tuple(
    msgspec.toml.decode((assets() / "steps.toml").read_bytes(), type=dict[str, list[Step]])["step"]
)
STEP_OF = {step.id: step for step in STEPS}


def formula_of(step: str, name: str, *, pi05: bool) -> str:
    """Formula of a tensor; "" for an input."""
    entry = STEP_OF[step]
    formulas = {**entry.formulas, **(entry.formulas_pi05 if pi05 else entry.formulas_pi0)}
    name = re.sub(r"layer_\d+", "layer_#", name)
    for key in (name, re.sub("^(prefix|suffix)/", "", name)):
        while key:
            if key in formulas:
                return formulas[key]
            key = key.rpartition("/")[0]
    return ""
