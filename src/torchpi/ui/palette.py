"""Colors of pages, plots and the dashboard, for light and dark backgrounds."""

PALETTE = {
    "paper": ("#faf9f6", "#101217"),
    "panel": ("#ffffff", "#191c23"),
    "ink": ("#1b1e25", "#e9e8e4"),
    "soft": ("#5d6470", "#a6abb6"),
    "faint": ("#9aa0ab", "#747b88"),
    "line": ("#e4e1d9", "#2c313b"),
    "vision": ("#0d8577", "#3cc2ae"),
    "prefix": ("#2f66d0", "#7aa5ff"),
    "cache": ("#7a4fd0", "#b197f7"),
    "suffix": ("#cf5a1e", "#ff9a62"),
    "time": ("#b7357f", "#f07fc0"),
    "noise": ("#8e96a3", "#8b93a1"),
}
"""Light and dark color by name: backgrounds and text first, then parts of the model, also used for curves."""

COLORS = {name: light for name, (light, _) in PALETTE.items()}
"""Colors for light backgrounds, used in plots."""

CYCLE = tuple(COLORS[name] for name in ("prefix", "suffix", "vision", "time", "noise"))
"""Colors of successive curves in one plot."""


def css_variables() -> str:
    """Style sheet with a variable per color that follows the system's light or dark mode."""
    light, dark = ("".join(f"--{name}:{colors[i]};" for name, colors in PALETTE.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
