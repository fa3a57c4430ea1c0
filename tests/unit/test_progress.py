"""Progress of long runs in logs and terminals, and tables in narrow terminals."""

import itertools
import sys
import types

from torchpi.rates import Rate
from torchpi.ui.progress import progress_bar
from torchpi.ui.tables import Column, PlainConsole, Table


def test_log_has_a_line_per_minute_and_the_last_line(capsys):
    seconds = itertools.count(0, 25)  # at every update
    with progress_bar("frames", 10, completed=2, clock=lambda: next(seconds)) as advance:
        for number in range(3, 11):
            advance(f"loss {number / 8:.3f}")
    assert capsys.readouterr().err.splitlines() == [
        "frames 5/10, loss 0.625, 0 h 01 min, 0 h 02 min left",
        "frames 8/10, loss 1.000, 0 h 02 min, 0 h 01 min left",
        "frames 10/10, loss 1.250, 0 h 03 min",
    ]


def test_hidden_progress_prints_nothing(capsys):
    with progress_bar("frames", 1, shown=False) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_notebook_prints_log_lines(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in notebooks
    with progress_bar("steps", 2) as advance:
        advance("loss 1")
        advance("loss 0.5")
    assert capsys.readouterr().err.startswith("steps 2/2, loss 0.5")


def test_narrow_terminal_shows_count_and_note(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    with progress_bar("evaluating episodes", 500, completed=433) as advance:
        advance("87% success")
    assert "434/500" in (shown := capsys.readouterr().err)
    assert "87% success" in shown
    assert "…" not in shown


def test_narrow_terminal_does_not_truncate_names_and_numbers(capsys):
    columns = [Column("task", "name"), Column("instruction"), Column("success, 95 % interval", "rate")]
    rows = [["drawer-open", "open the drawer", Rate(0.5, (0.1, 0.9), 2), "103"]]
    PlainConsole(width=40).print(Table([*columns, Column("steps", "number")], rows).to_rich(), crop=False)
    shown = capsys.readouterr().out
    assert [text in shown for text in ("drawer-open", "95 % interval", "50% (10% – 90%), 1 of 2", "103", "steps")] == [
        True
    ] * 5
