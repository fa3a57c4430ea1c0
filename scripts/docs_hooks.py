"""MkDocs hooks: generated pages, pages of files outside docs/, versions and dates, and an offline check.

`make docs` runs them; mkdocs.yml names this file.
"""

import pathlib
import posixpath
import re
import subprocess
from collections.abc import Iterator

from docs_pages import api_page, cli_page, fill_markers
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from torchpi.version import __version__

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
INCLUDED = ("CHANGELOG.md", "CONTRIBUTING.md", "client/README.md", "benchmarks/README.md")
"""Documents outside docs/ that are in the navigation."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a page for each file of the repository that a document links to."""
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/api.md", content=api_page()))
    waiting = [*INCLUDED, *(path for file in files.documentation_pages() for path in linked(file.src_uri))]
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(page_of(path)) is None and not path.startswith("docs/"):
            files.append(File.generated(config, page_of(path), content=file_page(path)))
            waiting += linked(page_of(path)) if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert generated content, and redirect links out of docs/ to the pages that `on_files` added."""
    uri = page.file.src_uri
    here = source_of(uri)
    if here is None:
        return markdown

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        to = path.removeprefix("docs/") if path.startswith("docs/") else page_of(path)
        return posixpath.relpath(to, posixpath.dirname(uri) or ".")

    return fill_markers(LINK.sub(target, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Append the version and the date of the last change to a page."""
    changed = last_change(source_of(page.file.src_uri))
    day = f", last changed on {changed}" if changed else ""
    return f'{html}\n<p class="page-version">torchpi {__version__}{day}</p>'


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from the network."""
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"?https?:[^\">]+|<link[^>]+stylesheet[^>]+href=\"?https?:[^\">]+"
    )
    for file in sorted(pathlib.Path(config.site_dir).rglob("*.html")):
        if found := loads.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file} has {found[0]}; pages must load nothing from the network.")


def source_of(uri: str) -> str | None:
    """Repository file of a page; None for a generated page."""
    for path in (f"docs/{uri}", uri):
        if (ROOT / path).is_file():
            return path
    return None


def page_of(path: str) -> str:
    """Page of a file outside docs/: documents keep their names, README.md is the home page."""
    if path == "README.md":
        return "index.md"
    return path if path.endswith(".md") else f"{path.rstrip('/')}.md"


def linked(uri: str) -> Iterator[str]:
    """Files outside docs/ that a page links to, relative to the repository's root."""
    here = source_of(uri)
    if here is None:
        return
    for link in LINK.findall((ROOT / here).read_text(encoding="utf-8")):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        if not path.startswith("docs/") and (ROOT / path).exists():
            yield path


def file_page(path: str) -> str:
    """Content of a file's page: a document unchanged, code in a block, a folder as its files."""
    source = ROOT / path
    if source.is_dir():
        names = sorted(file.name for file in source.iterdir() if file.suffix in (".py", ".md", ".json"))
        return f"# {path}\n\n" + "\n\n".join(code(f"{path}/{name}", heading="##") for name in names)
    return source.read_text(encoding="utf-8") if path.endswith(".md") else code(path)


def code(path: str, heading: str = "#") -> str:
    language = {".py": "python", ".json": "json", ".sh": "bash"}.get(pathlib.Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    return f"{heading} {path}\n\n````{language}\n{text}\n````\n"


def last_change(path: str | None) -> str:
    """Date of a file's last commit; empty without git."""
    if path is None:
        return ""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs", "--", path]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
