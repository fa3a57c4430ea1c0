"""Write the tables of docs/checkpoints.md from src/torchpi/assets/checkpoint_fields.toml; other text is left as it is.

    python scripts/checkpoint_fields.py [--check]

--check writes nothing, and exits with status 1 if the page isn't that of the data.
"""

import json
import pathlib
import sys

from torchpi.checkpoints.fields import FIELDS, Field

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"
BEGIN, END = (f"<!-- {word} of what scripts/checkpoint_fields.py writes -->\n" for word in ("begin", "end"))


def tables() -> str:
    """The tables of all files."""
    lines = ["| file or step | field | |", "| --- | --- | --- |"]
    for table, fields in FIELDS.items():
        file = table.replace(": ", ", ")
        lines += [f"| {file} | `{name}` | {described(field)} |" for name, field in fields.items()]
        lines += [] if fields else [f"| {file} | none | |"]
    return "\n".join(lines) + "\n"


def described(field: Field) -> str:
    """The entry of a field."""
    if field.used is not None:
        return f"used: {field.used}"
    if field.unused is not None:
        return f"no effect: {field.unused}"
    values = [value if value == "null" else json.dumps(value) for value in field.only]
    return f"only {' or '.join(f'`{value}`' for value in values)}: {field.because}"


def main() -> int:
    """Write the page, or compare it."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}{tables()}{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(written, "utf-8")
    elif written != text:
        print(f"{PAGE.name} is not that of the data")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
