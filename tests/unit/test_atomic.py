"""Atomic writing of files and folders, and errors of full disks that name the file."""

import contextlib
import errno
import os
import pathlib

import pytest
from matplotlib.figure import Figure

from torchpi.atomic import atomic_file, atomic_folder, replace_text
from torchpi.cli import main
from torchpi.schema import write_json
from torchpi.ui.plots import draw_figure, save_figure


def write_page(path):
    replace_text(path, "new")


def write_document(path):
    write_json(path, {"new": 1})


def write_plot(path):
    save_figure(draw_figure(lambda figure: figure.subplots(), size=(1, 1)), path)


WRITERS = [write_page, write_document, write_plot]


def test_leftovers_of_a_killed_process_are_replaced_by_the_next_write(tmp_path):
    with atomic_file(tmp_path / "report.html") as first:
        first.touch()
    with atomic_file(tmp_path / "report.html") as second:
        second.touch()
    assert first == second


@pytest.fixture
def full_disk(monkeypatch):
    """A full disk, whose write errors have no file name, as in the operating system."""

    def fail(path, *_, **__):
        pathlib.Path(path).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_text", fail)
    savefig = Figure.savefig  # is also used for pages
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, to, **how: (fail if isinstance(to, pathlib.Path) else savefig.__get__(self))(to, **how),
    )


@pytest.mark.parametrize("write", WRITERS)
def test_files_are_replaced_without_leftovers(write, tmp_path):
    file = tmp_path / "folder/report"
    write(file)
    before = file.read_bytes()
    file.write_text("old")
    write(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("write", WRITERS)
def test_full_disk_names_the_file_and_keeps_the_old_one(write, tmp_path, full_disk):
    file = tmp_path / "report"
    file.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/report'") as caught:
        write(file)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk_is_reported_by_commands(tmp_path, full_disk, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit):
        main(["trace", "tiny", "--html", str(page)])
    assert f"error: [Errno 28] No space left on device: '{page}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_a_folder(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/policy'"), atomic_folder(tmp_path / "policy"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "actions.npz"
    file.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), atomic_file(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_error_about_the_path_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file/report.html", "."):
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            replace_text(tmp_path / name, "new")
        assert ".tmp" not in str(caught.value)
    with pytest.raises(OSError, match="File name too long"):
        replace_text(tmp_path / ("x" * 300), "new")


def test_longest_names_can_be_written(tmp_path):
    replace_text(tmp_path / ("x" * 255), "new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


def test_links_stay_and_devices_are_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    replace_text(pathlib.Path("/dev/null"), "new")
    assert not pathlib.Path("/dev/null").is_file()


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_file(tmp_path / "file"):
        (tmp_path / "other").read_text()
    with pytest.raises(ConnectionResetError) as caught, atomic_folder(tmp_path / "folder"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert caught.value.filename is None
