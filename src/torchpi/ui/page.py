"""Template of self-contained HTML pages, without scripts or requests.

Arguments described as texts are escaped here; arguments described as HTML are inserted unchanged.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from torchpi.assets import assets
from torchpi.ui.palette import css_variables
from torchpi.version import __version__

Section = tuple[str, str, str]
"""ID, title (a text) and HTML."""


def html_page(title: str, *, header: str, sections: Sequence[Section], footer: str) -> str:
    """Render a whole page; it follows the system's light or dark mode.

    Args:
        header: HTML of `page_header`.
        footer: text.
    """
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(text)}</h2>{html}</section>' for name, text, html in sections)
    return (
        f"{page_head(title, style_sheet())}<body>{header}<nav><div>{links}</div></nav><main>{body}</main>"
        f"{page_footer(footer)}</body></html>"
    )


def page_section(page: str, name: str, values: Mapping[str, object], present: Collection[str] = ()) -> Section:
    """Fill a section of a page template.

    Args:
        page: file name of the template in the assets.
        values: HTML that replaces `{name}`; texts in the title.
        present: conditions for `fill_lines` that hold, in addition to the names of non-empty values.
    """
    template = (assets() / page).read_text(encoding="utf-8")
    match = re.search(rf'<section id="{name}" title="(.*?)">\n(.*?)\n</section>', template, re.DOTALL)
    assert match is not None
    title, body = match.groups()
    conditions = {*present, *(key for key, value in values.items() if value)}
    return name, title.format_map(values), fill_lines(body, values, conditions)


def fill_lines(text: str, values: Mapping[str, object], present: Collection[str]) -> str:
    """Replace `{name}` by values, and drop lines whose data-if condition is not present."""
    lines = [(line, re.search('data-if="(.*?)"', line)) for line in text.splitlines()]
    return "\n".join(line for line, condition in lines if not condition or condition[1] in present).format_map(values)


def style_sheet() -> str:
    """Style sheet of every page: the palette and assets/page.css."""
    return css_variables() + (assets() / "page.css").read_text(encoding="utf-8")


def page_head(title: str, style: str, links: str = "") -> str:
    """HTML before the body; `links` is HTML for the head."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>{links}<style>{style}</style></head>"
    )


def page_footer(text: str = "") -> str:
    """HTML of the footer: torchpi's version and a text."""
    return f"<footer>torchpi {escape(__version__)}{f' · {escape(text)}' if text else ''}</footer>"


def page_header(
    eyebrow: str, title: str, summary: str, *, tiles: Sequence[tuple[str, str]], notes: Sequence[str] = ()
) -> str:
    """HTML of a page's header, from texts.

    Args:
        eyebrow: line above the title.
        summary: paragraph below the title.
        tiles: large values, each with its meaning; may be empty.
        notes: list below the tiles.
    """
    facts = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<header class="top"><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(summary)}</p>'
        + (f'<div class="facts">{facts}</div>' if facts else "")
        + (f'<ul class="notes">{items}</ul>' if items else "")
        + "</header>"
    )


def panel(html: str, css: str = "") -> str:
    """HTML in a bordered box."""
    return f'<div class="panel {css}">{html}</div>' if css else f'<div class="panel">{html}</div>'


def figure(title: str, note: str, html: str) -> str:
    """Figure with title and note (texts) above a plot or an image."""
    return f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{html}</figure>"


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Definition list of names and texts."""
    return panel(f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}</dl>")


def commands(rows: Iterable[tuple[str, str]]) -> str:
    """Commands, each below a text that describes it."""
    items = "".join(f"<div>{escape(text)}<code>{escape(command)}</code></div>" for text, command in rows)
    return panel(items, "commands")


def bars(rows: Iterable[tuple[str, float | int, str]], css: str = "suffix") -> str:
    """Horizontal bars.

    Args:
        rows: name, length from 0 to 1, and text of each bar.
        css: color name in the palette.
    """
    items = "".join(
        f'<span class="mono">{escape(name)}</span><i class="{css}" style="width:{100 * length:.1f}%"></i>'
        f"<span>{escape(text)}</span>"
        for name, length, text in rows
    )
    return panel(items, "bars dimensions")


def camera_images(images: Iterable[tuple[str, str | None]]) -> str:
    """Camera images side by side.

    Args:
        images: name and image URL of each camera, such as from `data_uri`; None for an absent camera.
    """
    figures = []
    for name, url in images:
        image = '<div class="absent">absent: masked</div>' if url is None else f'<img alt="{escape(name)}" src="{url}">'
        figures.append(f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>")
    return f'<div class="cameras">{"".join(figures)}</div>'
