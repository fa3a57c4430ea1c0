"""scripts/lint_house.py reports each kind of violation, and nothing else."""

import pathlib
import runpy

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "lint_house.py"


@pytest.fixture
def lint(tmp_path, capsys):
    """Return a function that writes files of src/torchpi and returns the script's output."""
    run = runpy.run_path(str(SCRIPT))["main"]

    def check(**files: str) -> list[str]:
        for name, text in files.items():
            path = tmp_path / "src" / "torchpi" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        status = run(tmp_path)
        *violations, sizes = capsys.readouterr().out.splitlines()
        assert status == bool(violations)
        assert sizes.startswith("src/torchpi: ")
        return violations

    return check


def test_clean_tree_has_no_violations(lint):
    model = (
        '"""The model."""\nfrom torchpi.types import B\nimport numpy\n\n\ndef f():\n    """Run it: how is fine."""\n'
    )
    assert lint(model__pi0=model, types="B = 1\n", policy="from torchpi.model import pi0\n") == []


@pytest.mark.parametrize(
    "text",
    [
        '"""What it is."""\n',
        'class A:\n    """Whether."""\n',
        'class A:\n    x: int\n    """\n    Which one.\n    """\n',
    ],
    ids=["module", "class", "field"],
)
def test_docstring_that_begins_with_a_question_word_is_reported(lint, text):
    (line,) = lint(types=text)
    assert "the docstring begins with 'W" in line
    assert line.startswith("src/torchpi/types.py:")


def test_long_file_and_function_are_reported(lint):
    function = "def f():\n" + "    pass\n" * 59
    assert lint(types=function + "x = 1\n" * 390) == []
    file_line, function_line = lint(types=function + "    pass\n" + "x = 1\n" * 390)
    assert "451 lines; expected at most 450" in file_line
    assert "f has 61 lines; expected at most 60" in function_line


def test_import_against_the_layers_is_reported(lint):
    inside = "def f():\n    from torchpi.policy import load_policy\n"
    (line,) = lint(robots__droid=inside, policy="x = 1\n")
    assert line == "src/torchpi/robots/droid.py:2: torchpi.robots.droid imports torchpi.policy, which is not below it"


def test_import_of_an_indirectly_lower_part_is_allowed(lint):
    assert lint(cli="import torchpi.model.pi0\n", model__pi0="x = 1\n") == []


def test_model_imports_only_types_config_errors(lint):
    (line,) = lint(model__pi0="from torchpi import schema\n", schema="x = 1\n")
    assert "torchpi.model imports schema" in line


def test_import_cycle_inside_a_part_is_reported(lint):
    (line,) = lint(model__a="from torchpi.model import b\n", model__b="def f():\n    import torchpi.model.a\n")
    assert line == "src/torchpi: imports in a circle: torchpi.model.a, torchpi.model.b"


def test_unknown_part_asks_for_a_layer(lint):
    (line,) = lint(cellar="from torchpi import types\n", types="x = 1\n")
    assert line == "src/torchpi/cellar: not in LAYERS of scripts/lint_house.py"
