"""Commands of the site's pages parse, their Python blocks run, and every page is in the navigation."""

import pathlib
import re
import shlex

import pytest
from commands import parsed

import torchpi
from torchpi.cli import COMMANDS
from torchpi.training.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("install", "your_robot", "from_openpi", "from_lerobot", "data_flow", "flow_matching", "masks", "steps", "faq")
FAQ = (DOCS / "faq.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Commands in indented blocks and in tables."""
    cells = re.findall(r"`torchpi ([^`…]+)`", "\n".join(re.findall(r"^\|.*", text, re.MULTILINE)))
    return re.findall(r"^    torchpi (.+)$", text, re.MULTILINE) + [cell for cell in cells if cell not in COMMANDS]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_parse(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("run").mkdir()
    pathlib.Path("run/train.json").write_text(TrainConfig(dataset="my_set", embodiment="so101").to_json())  # --resume
    for line in commands((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        arguments = shlex.split(line.partition(" > ")[0], comments=True)
        if "--tyro-print-completion" in arguments:  # ends the program
            continue
        try:
            parsed(arguments)
        except SystemExit:
            pytest.fail(f"torchpi {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", ["index", "data_flow", "flow_matching", "masks"])
def test_python_of_the_page_runs(page):
    (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(block, f"{page}.md", "exec"), {"torchpi": torchpi})


def test_each_question_has_a_short_answer_and_a_command():
    questions = re.split(r"^### ", FAQ, flags=re.MULTILINE)[1:]
    assert len(questions) == 41
    for question in questions:
        title, body = question.split("\n", 1)
        lines = [line for line in body.split("\n## ")[0].splitlines() if line.strip()]
        assert 1 <= sum(not line.startswith("    ") for line in lines) <= 4, title
        assert any(line.startswith("    torchpi ") for line in lines), title


def test_every_document_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in navigation] == []
