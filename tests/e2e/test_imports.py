"""What is imported, and what is not."""

import subprocess
import sys

import pytest


def imported_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import torchpi", "import torchpi.transforms", "import torchpi.robots"])
def test_no_torch_is_needed(statement):
    assert "torch" not in imported_by(statement)


def test_the_model_brings_nothing_heavy():
    heavy = {"tensorstore", "matplotlib", "sentencepiece", "tokenizers", "PIL", "rich", "tyro", "pyarrow"}
    assert not heavy & imported_by("import torchpi.model.pi0")
