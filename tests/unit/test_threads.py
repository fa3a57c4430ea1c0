"""Thread settings of the commands, which do not override the user's."""

import os
import subprocess
import sys

import pytest
import torch

import torchpi
from torchpi.threads import SPIN_COUNT, limit_threads, spin_briefly


@pytest.fixture
def threads(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_waiting_threads_sleep_soon(threads):
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_users_own_setting_stays(threads, name, monkeypatch):
    monkeypatch.setenv(name, "ACTIVE")
    spin_briefly()
    assert os.environ[name] == "ACTIVE"
    assert len({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()) == 1


def test_small_model_runs_with_one_thread(threads):
    limit_threads(torchpi.load_model("demo"))
    assert torch.get_num_threads() == 1


def test_large_model_and_users_number_keep_their_threads(threads, monkeypatch):
    monkeypatch.setattr("torchpi.threads.SMALL_MODEL", 10)
    limit_threads(torchpi.load_model("demo"))
    assert torch.get_num_threads() == 2
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads(torchpi.load_model("demo"))
    assert torch.get_num_threads() == 2


def test_commands_are_parsed_before_torch_is_imported():
    """PyTorch reads the environment when it is imported."""
    program = "import sys, torchpi.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
