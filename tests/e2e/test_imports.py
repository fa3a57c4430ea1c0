"""Imports: names resolve lazily, and nothing heavy comes along."""

import subprocess
import sys

import pytest

import torchpi


def imported_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import torchpi", "import torchpi.transforms", "import torchpi.robots", "import torchpi.cli"]
)
def test_import_without_torch(statement):
    assert "torch" not in imported_by(statement)


def test_model_imports_nothing_heavy():
    heavy = {"tensorstore", "matplotlib", "sentencepiece", "tokenizers", "PIL", "rich", "tyro", "pyarrow"}
    assert not heavy & imported_by("import torchpi.model.pi0")


NAMES = ("torchpi.load_policy", "torchpi.transforms.images.resize_with_pad", "torchpi.errors.ModelError")
MORE_NAMES = (
    "torchpi.load_model",
    "torchpi.Pi0Config",
    "torchpi.Observation.from_dict",
    "torchpi.model.masks.make_attn_mask",
    "torchpi.model.flow.posemb_sincos",
    "torchpi.robots.get_embodiment",
    "torchpi.checkpoints.load_model",
    "torchpi.data.LeRobotDataset",
    "torchpi.policy.load_policy",
)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_NAMES)])
def test_public_names_resolve_after_bare_import(name):
    program = f"import torchpi\nassert callable({name})"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_such"):
        torchpi.nothing_such  # noqa: B018
