"""Generate the tables of docs/robots from src/torchpi/assets/robots; the hand-written text after them is kept.

    python scripts/robot_pages.py [--check]

--check writes nothing, and exits with status 1 if a page is out of date.
"""

import json
import pathlib
import sys

from torchpi.robots import Embodiment
from torchpi.robots.presets import RELEASED, ROBOT_FILES, read_embodiment

PAGES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "robots"
END = "<!-- written by scripts/robot_pages.py up to here -->\n"


def page(name: str) -> str:
    """Generated part of a robot's page."""
    robot, comment = read_embodiment(ROBOT_FILES[name]), json.loads(ROBOT_FILES[name].read_text("utf-8"))["comment"]
    return "\n".join(
        [
            f"# {name}\n",
            f"{comment['title']}. [The data]({relative(name)}); `--embodiment {name}`.\n",
            f"**Rate** {robot.control_hz} Hz; execute {robot.execute_steps} actions of each chunk. **Statistics** "
            f"{statistics(name)}.\n",
            *table("camera of the model", "key in the observation", "presence", rows=cameras(robot)),
            *(dimensions(robot) if robot.state_names == robot.action_names else state_and_actions(robot)),
            "Sources:\n",
            *(f"- {what}: {source}" for what, source in comment.items() if what != "title"),
            f"\n{END}",
        ]
    )


def index() -> str:
    """Generated part of docs/robots/README.md."""
    rows = []
    for name in ROBOT_FILES:
        robot, comment = read_embodiment(ROBOT_FILES[name]), json.loads(ROBOT_FILES[name].read_text("utf-8"))["comment"]
        numbers = f"{len(robot.state_names)} / {robot.action_size}", f"{robot.control_hz} Hz"
        rows.append((f"[{name}]({name}.md)", comment["title"], *numbers, statistics(name)))
    heading = ("--embodiment", "robot", "state / actions", "rate", "statistics of the released checkpoints")
    return "\n".join(["# Robots\n", *table(*heading, rows=rows), END])


def relative(name: str) -> str:
    """Path of a robot's file, relative to the pages."""
    return f"../../src/torchpi/assets/robots/{name}.json"


def statistics(name: str) -> str:
    """Released statistics of a robot."""
    found = [
        f"`{asset}` of {', '.join(entry['checkpoints'])}"
        for asset, entry in RELEASED["statistics"].items()
        if entry["robot"] == name
    ]
    return "; ".join(found) or "your dataset's"


def cameras(robot: Embodiment) -> list[tuple[str, ...]]:
    """Rows of the camera table."""
    return [
        (f"`{camera.name}`" if camera.name else "", f"`{camera.key}`" if camera.key else "", camera.presence)
        for camera in robot.cameras
    ]


def dimensions(robot: Embodiment) -> list[str]:
    """Table of the state and actions, if they have the same names."""
    rows = [
        (str(i), f"`{dim.name}`", dim.unit, dim.command or "", dim.kind, limits(dim.low, dim.high))
        for i, dim in enumerate(robot.actions)
    ]
    return table("", "state and action", "unit", "command", "kind", "limits", rows=rows)


def state_and_actions(robot: Embodiment) -> list[str]:
    """Table of the state, then table of the actions."""
    units = zip(robot.state_names, robot.state_units, strict=True)
    rows = [(str(i), f"`{name}`", unit) for i, (name, unit) in enumerate(units)]
    actions = dimensions(robot)
    return [*table("", "state", "unit", rows=rows), actions[0].replace("state and action", "action"), *actions[1:]]


def limits(low: float | None, high: float | None) -> str:
    """Range, or a dash if none is stated."""
    return "–" if low is None or high is None else f"{low:g} … {high:g}"


def table(*titles: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table, with an empty line at the end."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [*(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines), ""]


def main() -> int:
    """Write or check all pages."""
    check = "--check" in sys.argv
    pages = {PAGES / "README.md": index()} | {PAGES / f"{name}.md": page(name) for name in ROBOT_FILES}
    problems = [f"{file}: no such robot" for file in PAGES.glob("*.md") if file not in pages]
    for file, generated in pages.items():
        text = file.read_text("utf-8") if file.exists() else ""
        if text.startswith(generated):
            continue
        if check:
            problems.append(f"{file}: out of date")
        else:
            file.write_text(generated + text.partition(END)[2], "utf-8")
            print(f"{file}: written")
    for problem in problems:
        print(problem)
    return int(check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
