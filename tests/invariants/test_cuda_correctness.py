"""Model, training and `Policy.infer` on a GPU of fake tensors: no mixed devices, no waiting for values.

The cases are in cuda_cases.py. They run in one separate process, in which the fake GPU is registered with PyTorch.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import filelock
import pytest
from cuda_cases import CASES, DROPPED, IN_UPDATE, MISTAKES

FILE = pathlib.Path(__file__).with_name("cuda_cases.py")
WRONG = [(kind, function) for kind, functions in MISTAKES.items() for function in functions]
MISTAKEN = [name for name in CASES if name.startswith("mistake")]
RIGHT = [name for name in CASES if name not in MISTAKEN]
FAST = [
    "sampling pi05 guided, prefix",
    "engine pi0",
    "loss pi05",
    "update pi0 micro-batches",
    "batch",
    "policy guided",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, worker_id):
    """Results of some cases, which one process computes for all tests."""

    @functools.cache
    def of_cases(fast: bool):
        names = [name for name in RIGHT if (name in FAST) == fast] + MISTAKEN * fast
        folder = tmp_path_factory.getbasetemp()
        path = (folder if worker_id == "master" else folder.parent) / f"cuda_cases_{fast}.json"
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                command = [sys.executable, str(FILE), *names]
                ran = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
                assert ran.returncode == 0, ran.stderr
                path.write_text(ran.stdout)
        return json.loads(path.read_text())

    return of_cases


def of(results, name):
    result = results(name not in RIGHT or name in FAST)[name]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RIGHT]
)
def test_case_has_no_findings_on_a_gpu(results, name):
    result = of(results, name)
    assert [finding["message"] for finding in result["findings"]] == []
    assert result["dtypes"] == []
    assert result["borders"].pop("TimeEmbedding.__call__", 0) == (not name.startswith("batch"))
    if name.startswith("sampling"):
        times = 2 if name == "sampling LoRA" else 1
        assert result["borders"] == {"Pi0._embed_valid_prefix": 3 * times, "Pi0.sample_many": times}
        assert set(result["borders"]) == set(DROPPED)
    elif name.startswith("update"):  # two of them
        assert result["borders"] == dict.fromkeys(IN_UPDATE, 2)
    elif name.startswith("batch"):
        assert result["borders"].keys() == {"to_device"}
    elif name.startswith("loss"):
        assert result["borders"] == {}


@pytest.mark.parametrize(("kind", "function"), WRONG)
def test_mistake_is_found_with_its_line(results, kind, function):
    findings = of(results, function.__name__)["findings"]
    assert {finding["kind"] for finding in findings} == {kind}
    for finding in findings:
        assert (finding["file"], finding["function"]) == (FILE.name, function.__name__)
        assert finding["line"] == function.__code__.co_firstlineno + 1
        assert finding["text"] == FILE.read_text().splitlines()[finding["line"] - 1].strip()


def test_mistake_in_the_backward_pass_is_found(results):
    (finding,) = of(results, "mistake in the backward pass")["findings"]
    assert finding["function"] == "reads_a_number"


def test_wrong_dtype_is_found(results):
    assert of(results, "mistake in the dtype")["dtypes"]
