"""The frame of a page that needs nothing else: no script, no request."""

from collections.abc import Sequence
from html import escape

import torchpi
from torchpi.assets import assets


def document(
    title: str, *, top: str, sections: Sequence[tuple[str, str, str]], footer: str, styles: Sequence[str] = ()
) -> str:
    """A whole page, as HTML, light or dark as the reader's system is.

    Args:
        top: what `page_top` makes.
        sections: of each its id, its title and its HTML.
        footer: a text.
        styles: names of packaged style sheets, beside the common one.
    """
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{html}</section>' for name, title, html in sections)
    style = "".join((assets() / name).read_text(encoding="utf-8") for name in ("trace.css", *styles))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"{top}<nav><div>{links}</div></nav><main>{body}</main>"
        f"<footer>torchpi {escape(torchpi.__version__)} · {escape(footer)}</footer></body></html>"
    )


def page_top(
    eyebrow: str, title: str, lede: str, *, tiles: Sequence[tuple[str, str]], notes: Sequence[str] = ()
) -> str:
    """The head of a page, from texts.

    Args:
        eyebrow: the line above the title.
        lede: the lines below it.
        tiles: large values, each with what it is.
        notes: what else the reader has to know.
    """
    facts = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<header class="top"><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(lede)}</p><div class="facts">{facts}</div>'
        + (f'<ul class="notes">{items}</ul>' if items else "")
        + "</header>"
    )
