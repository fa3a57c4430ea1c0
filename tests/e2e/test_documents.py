"""Links of the documents lead to existing files and headings, and the README links every document."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "client", ROOT / "integrations" / "ros2")
DOCUMENTS = sorted(document for folder in FOLDERS for document in folder.glob("*.md"))


def anchors(document: pathlib.Path) -> set[str]:
    """Anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_readme_links_every_document():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in readme] == []


def test_dockerfile_installs_what_the_guide_says():
    """Its Debian packages are the guide's, and its extras exist."""
    dockerfile, guide = ((ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", "docs/install.md"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (chosen,) = re.findall(r"\./client '\.\[(.+)\]'", dockerfile)
    assert set(chosen.split(",")) <= set(extras)
    (packages,) = re.findall(r"apt-get install (lib[\w -]+)`", guide)
    assert packages in dockerfile
