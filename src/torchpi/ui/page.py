"""The page template: HTML that needs nothing else, no script and no request.

Arguments that are said to be texts are escaped here; those that are said to be HTML are the caller's.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from torchpi.assets import assets
from torchpi.ui.palette import css_variables
from torchpi.version import __version__

Section = tuple[str, str, str]
"""Id, title (a text) and HTML."""


def html_page(title: str, *, header: str, sections: Sequence[Section], footer: str) -> str:
    """Render a whole page, light or dark as the reader's system is.

    Args:
        header: HTML of `page_header`.
        footer: a text.
    """
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(text)}</h2>{html}</section>' for name, text, html in sections)
    return (
        f"{page_head(title, style_sheet())}<body>{header}<nav><div>{links}</div></nav><main>{body}</main>"
        f"{page_footer(footer)}</body></html>"
    )


def page_section(page: str, name: str, values: Mapping[str, object], present: Collection[str] = ()) -> Section:
    """Fill a section of a page of the assets.

    Args:
        page: the file's name.
        values: HTML that stands for `{name}`; the title's are texts.
        present: conditions that hold besides the values that are not empty, see `fill_lines`.
    """
    text = (assets() / page).read_text(encoding="utf-8")
    found = re.search(rf'<section id="{name}" title="(.*?)">\n(.*?)\n</section>', text, re.DOTALL)
    assert found is not None
    holds = {*present, *(key for key, value in values.items() if value)}
    return name, found[1].format_map(values), fill_lines(found[2], values, holds)


def fill_lines(text: str, values: Mapping[str, object], present: Collection[str]) -> str:
    """Put values in place of `{name}`; a line with data-if stands only if its condition is present."""
    lines = [(line, re.search('data-if="(.*?)"', line)) for line in text.splitlines()]
    return "\n".join(line for line, only in lines if not only or only[1] in present).format_map(values)


def style_sheet() -> str:
    """The style sheet of every page: the palette and assets/page.css."""
    return css_variables() + (assets() / "page.css").read_text(encoding="utf-8")


def page_head(title: str, style: str, links: str = "") -> str:
    """HTML up to the body; `links` is HTML for the head."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>{links}<style>{style}</style></head>"
    )


def page_footer(text: str = "") -> str:
    """HTML of the last line: torchpi's version and a text."""
    return f"<footer>torchpi {escape(__version__)}{f' · {escape(text)}' if text else ''}</footer>"


def page_header(
    eyebrow: str, title: str, summary: str, *, tiles: Sequence[tuple[str, str]], notes: Sequence[str] = ()
) -> str:
    """HTML of a page's header, from texts.

    Args:
        eyebrow: the line above the title.
        summary: the lines below it.
        tiles: large values, each with its meaning.
        notes: remarks below the tiles.
    """
    facts = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<header class="top"><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(summary)}</p><div class="facts">{facts}</div>'
        + (f'<ul class="notes">{items}</ul>' if items else "")
        + "</header>"
    )


def panel(html: str, css: str = "") -> str:
    """A bordered box around HTML."""
    return f'<div class="panel {css}">{html}</div>' if css else f'<div class="panel">{html}</div>'


def figure(title: str, note: str, html: str) -> str:
    """A figure: title and note (texts) above a plot or an image."""
    return f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{html}</figure>"


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """A list of names with their texts."""
    return panel(f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}</dl>")


def commands(rows: Iterable[tuple[str, str]]) -> str:
    """Commands, each below a text that says what it does."""
    items = "".join(f"<div>{escape(text)}<code>{escape(command)}</code></div>" for text, command in rows)
    return panel(items, "commands")


def bars(rows: Iterable[tuple[str, float | int, str]], css: str = "suffix") -> str:
    """Horizontal bars.

    Args:
        rows: of each bar its name, its length from 0 to 1, and its text.
        css: the colour's name in the palette.
    """
    items = "".join(
        f'<span class="mono">{escape(name)}</span><i class="{css}" style="width:{100 * length:.1f}%"></i>'
        f"<span>{escape(text)}</span>"
        for name, length, text in rows
    )
    return panel(items, "bars dimensions")


def camera_images(images: Iterable[tuple[str, str | None]]) -> str:
    """Cameras next to each other.

    Args:
        images: of each camera its name and the image's address, for example of `data_uri`; None: the camera is absent.
    """
    figures = "".join(
        f"<figure>{_camera(name, source)}<figcaption>{escape(name)}</figcaption></figure>" for name, source in images
    )
    return f'<div class="cameras">{figures}</div>'


def _camera(name: str, source: str | None) -> str:
    if source is None:
        return '<div class="absent">absent: masked</div>'
    return f'<img alt="{escape(name)}" src="{source}">'
