"""Progress of long runs in a log."""

import itertools
import sys
import types

from torchpi.ui.progress import progress_bar


def test_a_log_gets_a_line_per_minute_and_the_last(capsys):
    seconds = itertools.count(0, 25)  # at every update
    with progress_bar("frames", 10, completed=2, clock=lambda: next(seconds)) as advance:
        for number in range(3, 11):
            advance(f"loss {number / 8:.3f}")
    assert capsys.readouterr().err.splitlines() == [
        "frames 5/10, loss 0.625, 0 h 01 min, 0 h 02 min left",
        "frames 8/10, loss 1.000, 0 h 02 min, 0 h 01 min left",
        "frames 10/10, loss 1.250, 0 h 03 min",
    ]


def test_progress_that_is_not_shown_prints_nothing(capsys):
    with progress_bar("frames", 1, shown=False) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_notebook_gets_lines_of_a_log(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks have it
    with progress_bar("steps", 2) as advance:
        advance("loss 1")
        advance("loss 0.5")
    assert capsys.readouterr().err.startswith("steps 2/2, loss 0.5")
