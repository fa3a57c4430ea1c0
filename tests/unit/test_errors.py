"""Helpers for error messages: untrusted text, lists, suggestions."""

import io

import pytest

from torchpi.checkpoints.sizes import read_config
from torchpi.errors import counted, did_you_mean, first_of, listed, printable
from torchpi.sim import check_tasks, environment_name, simulator
from torchpi.ui.tables import Column, PlainConsole, Table, grid


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe π₀ 机器人", "Größe π₀ 机器人"),
        ("a\nb\rc", r"a\nb\rc"),
        ("\x1b[2J\x00", r"\x1b[2J\x00"),
        ("\u202egnp.exe\u2028\ufeff", r"\u202egnp.exe\u2028\ufeff"),
        ("\ud800", r"\ud800"),
        (ValueError("x\ty"), r"x\ty"),
    ],
)
def test_printable_escapes_control_characters(text, shown):
    assert printable(text) == shown
    assert printable(text).encode()


def test_counted_and_listed_form_english_phrases():
    assert [counted(count, "episode") for count in (0, 1, 2)] == ["0 episodes", "1 episode", "2 episodes"]
    assert counted(2, "process", "processes") == "2 processes"
    assert [listed("abc"[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert listed((6, 7, 8), "or") == "6, 7 or 8"


def test_unknown_names_suggest_the_closest():
    assert did_you_mean("so1o1", ["so100", "so101"]) == " (did you mean so101?)"
    assert did_you_mean("nothing", ["so101"]) == ""
    with pytest.raises(KeyError, match=r"no environment 'metawrld' \(did you mean metaworld\?\); expected "):
        simulator("metawrld")
    with pytest.raises(KeyError, match=r"no task 'lfit' \(did you mean lift\?\), 'x'; its tasks are lift, place\."):
        check_tasks("so101", ["lfit", "x"])
    with pytest.raises(ValueError, match=r"neither a file nor a preset; .* \(did you mean pi05_libero\?\)\."):
        read_config("pi05_liberoo")


def test_suite_with_or_without_prefix_is_accepted():
    assert environment_name("libero", "libero_10") == environment_name("libero", "10")


def test_long_text_keeps_both_ends_and_states_its_length():
    text = printable("begin" + "x" * 10**6 + "end", 100)
    assert len(text) < 150
    assert text.startswith("begin")
    assert "end (1000008 characters)" in text
    assert len(printable("\x00" * 10**6, 100)) <= 200


def test_line_breaks_can_be_kept():
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


def test_list_of_names_is_short_and_printable():
    assert first_of(["a\nb", *("k" * 3000 for _ in range(9000))]).startswith(r"a\nb, kkk")
    assert len(first_of(["k" * 3000] * 9000)) < 5000


def test_untrusted_names_are_plain_text_on_the_terminal():
    file = io.StringIO()
    name = "x\x1b[2J [bold]y[/bold]\r"
    console = PlainConsole(file=file, width=200, force_terminal=True, color_system=None)
    console.print(name, Table([Column("name")], [[name]]).to_rich(), grid(["a"], [[name]]))
    assert file.getvalue().count(r"x\x1b[2J [bold]y[/bold]\r") == 3
    assert "\x1b[2J" not in file.getvalue()
    assert console.status("reading data[/bold]\x1b").renderable.text.plain == r"reading data[/bold]\x1b"
