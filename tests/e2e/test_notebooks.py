"""The notebooks run completely and show their results."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
RESULTS = {
    "quick_start": "success: True",
    "trace": "largest difference from sample_actions",
    "fine_tune": "after: ",
    "control_loop": "rtc: success",
}


def test_every_notebook_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(RESULTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_notebook_runs(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert RESULTS[name] in text_of(notebook)


@pytest.mark.parametrize("name", RESULTS)
def test_notebook_contains_outputs_without_warnings(name):
    """For readers who don't run it: outputs are stored, without warnings, in a small file."""
    path = EXAMPLES / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    text = text_of(notebook)
    assert RESULTS[name] in text
    assert "Warning" not in text
    assert "Traceback" not in text
    assert path.stat().st_size < 500_000


def text_of(notebook) -> str:
    """The text that its cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") for output in outputs)
