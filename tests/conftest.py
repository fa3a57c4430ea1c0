"""Every test runs with the shape annotations of torchpi checked at each call."""

import importlib.util
import pathlib

from jaxtyping import install_import_hook


def _modules_with_shapes() -> list[str]:
    """Modules of torchpi that annotate shapes. Checking every other call too would take a third of the tests' time."""
    spec = importlib.util.find_spec("torchpi")
    assert spec is not None
    root = pathlib.Path(str(spec.origin)).parent
    files = [path for path in root.rglob("*.py") if "jaxtyping" in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in files]


# Before anything of torchpi is imported.
install_import_hook(_modules_with_shapes(), "beartype.beartype")

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import torchpi  # noqa: E402

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("torchpi", deadline=None, derandomize=True)
hypothesis.settings.load_profile("torchpi")

GOLDEN = pathlib.Path(__file__).parent / "golden"


class Golden:
    """One kind of golden model: its inputs, outputs and weights."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.root = GOLDEN / kind
        self.config = self.root / "model_config.json"
        self.checkpoint = self.root / "jax_ckpt_pure"
        with np.load(self.root / "inputs.npz") as arrays:
            self.inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with np.load(self.root / "outputs.npz") as arrays:
            self.outputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def observation_dict(self) -> dict[str, Any]:
        """The batch in the layout of `Observation.from_dict`."""
        nested: dict[str, Any] = {"image": {}, "image_mask": {}}
        for name, value in self.inputs.items():
            group, _, camera = name.partition(".")
            if camera:
                nested[group][camera] = value
            elif name in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
                nested[name] = value
        return nested

    def observation(self) -> torchpi.Observation:
        return torchpi.Observation.from_dict(self.observation_dict())

    def model(self, dtype: torch.dtype = torch.float32) -> torchpi.Pi0:
        """A fresh copy with the golden weights."""
        return torchpi.load_model(self.checkpoint, config=self.config, dtype=dtype)


@pytest.fixture(params=["pi05", "pi0"], scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def golden_pi05() -> Golden:
    return Golden("pi05")


@pytest.fixture(scope="session")
def golden_pi0() -> Golden:
    return Golden("pi0")


@pytest.fixture(scope="session")
def golden_root() -> pathlib.Path:
    return GOLDEN


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """No server answers, and nothing is cached."""
    from torchpi.checkpoints import sources

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCHPI_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_RETRIES", 0)


@pytest.fixture(scope="session")
def policy_cases() -> dict[str, Any]:
    """golden/policy's table: per case its settings."""
    return json.loads((GOLDEN / "policy" / "policy.json").read_text())


@pytest.fixture(scope="session")
def policy_case() -> Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Raw request and all arrays of one golden policy case."""

    def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        with np.load(GOLDEN / "policy" / name / "case.npz") as arrays:
            case = {key: arrays[key] for key in arrays.files}
        return {key.removeprefix("obs."): value for key, value in case.items() if key.startswith("obs.")}, case

    return load
