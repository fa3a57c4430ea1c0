"""Check the house rules that ruff and mypy do not cover; print each violation, and exit with 1 if there is any.

    python scripts/lint_house.py [ROOT]

1. No docstring begins with a question word.
2. No file of src/torchpi is longer than 450 lines, no function longer than 60 (docstring included).
3. Imports in src/torchpi go one way (`LAYERS`) without cycles; imports inside functions count.
4. torchpi/model imports only torchpi's types, config and errors.
"""

import ast
import pathlib
import re
import statistics
import sys
from collections.abc import Iterator, Mapping

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
TARGET_LINES, TARGET_MEDIAN = 20_000, 140
"""Targets for src/torchpi, which are only reported."""
QUESTION = re.compile(r"(What|How|Where|Who|Whom|Whose|Which|Whether|Why|When)\b")
PYTHON = ("src", "client/src", "tests", "scripts", "benchmarks", "recipes", "examples", "integrations")
READING_PATH = ("types", "model/flow", "model/gemma", "model/suffix", "model/pi0", "transforms/pipeline", "policy")
READING_PATH += ("training/loop",)

LAYERS: Mapping[str, str] = {
    "version": "",
    "errors": "",
    "devices": "errors",
    "threads": "",
    "assets": "errors",
    "atomic": "errors",
    "extras": "errors",
    "randomness": "errors",
    "rates": "errors",
    "arrays": "errors",
    "schema": "errors atomic",
    "types": "errors",
    "config": "schema assets",
    "model": "types config",
    "collate": "model",
    "engine": "model extras",
    "checkpoints": "engine atomic transforms robots version rates devices",
    "transforms": "types schema arrays",
    "robots": "transforms schema assets",
    "samples": "transforms config",
    "policy": "checkpoints robots collate devices samples",
    "convert": "policy",
    "data": "robots randomness extras assets atomic",
    "evaluation": "policy data ui",
    "sim": "policy data ui",
    "training": "sim evaluation",
    "ui": "assets atomic extras version rates",
    "serving": "policy data ui threads",
    "inspect": "policy ui data",
    "demo": "inspect sim training convert",
    "bench": "training serving",
    "cli": "threads bench demo inspect serving training convert",
    "torchpi": "cli",
}
"""Parts that each part of torchpi may import, directly or through other parts."""

MODEL_IMPORTS = {"model", "types", "config", "errors"}

EXCEPTIONS: Mapping[tuple[str, str], str] = {
    ("torchpi.data.metadata", "checkpoints"): "datasets are downloaded as checkpoints are, through checkpoints/hub.py",
    ("torchpi.inspect.nanopi", "torchpi"): "examples/nanopi.py reads its weights with torchpi.load_model",
}
"""Allowed exceptions (importing module, imported part), with their reasons."""


def main(root: pathlib.Path) -> int:
    """Print violations and sizes, and return the exit status."""
    files = {path: path.read_text(encoding="utf-8") for path in python_files(root)}
    package = {path: text for path, text in files.items() if path.is_relative_to(root / "src" / "torchpi")}
    found = [
        *(line for path, text in files.items() for line in question_docstrings(path.relative_to(root), text)),
        *(line for path, text in package.items() for line in too_long(path.relative_to(root), text)),
        *import_violations(root / "src", package),
    ]
    for line in found:
        print(line)
    report_sizes(root, package)
    return int(bool(found))


def python_files(root: pathlib.Path) -> list[pathlib.Path]:
    """List the repository's Python files, without environments and builds."""
    return sorted(path for folder in PYTHON for path in (root / folder).rglob("*.py") if "build" not in path.parts)


def question_docstrings(path: pathlib.Path, text: str) -> Iterator[str]:
    """Docstrings of modules, classes, functions and fields that begin with a question word."""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if word := QUESTION.match(str(node.value.value).strip()):
            yield f"{path}:{node.lineno}: the docstring begins with {word[0]!r}; expected a noun or an imperative"


def too_long(path: pathlib.Path, text: str) -> Iterator[str]:
    """Files and functions that exceed the limits."""
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{path}:1: the file has {lines} lines; expected at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines; expected at most {MAX_FUNCTION_LINES}"


def import_violations(source: pathlib.Path, package: Mapping[pathlib.Path, str]) -> Iterator[str]:
    """Imports that violate the layers or form a cycle, and forbidden imports of torchpi/model."""
    modules = {module_name(path.relative_to(source)): path for path in package}
    graph: dict[str, set[str]] = {}
    for part in sorted({part_of(module) for module in modules} - LAYERS.keys()):
        yield f"src/torchpi/{part}: not in LAYERS of scripts/lint_house.py"
    for module, path in modules.items():
        found = list(imports_of(package[path], modules))
        graph[module] = {name for _, name in found if name != module}
        if module == "torchpi":  # resolves its names lazily
            graph[module] = set()
            continue
        for error in dict.fromkeys(f"{line}: {error}" for line, name in found if (error := forbidden(module, name))):
            yield f"{path.relative_to(source.parent)}:{error}"
    for circle in circles(graph):
        yield f"src/torchpi: imports in a circle: {', '.join(circle)}"


def forbidden(module: str, imported: str) -> str:
    """Error message for an import, or an empty string."""
    part, other = part_of(module), part_of(imported)
    if part == other or (module, other) in EXCEPTIONS:
        return ""
    if not {part, other} <= LAYERS.keys():
        return ""
    if part == "model":
        return "" if other in MODEL_IMPORTS else f"torchpi.model imports {other}; expected types, config or errors"
    return "" if other in parts_below(part) else f"{module} imports {imported}, which is not below it"


def part_of(module: str) -> str:
    """Top-level package or module in torchpi, or "torchpi" itself."""
    return module.split(".")[1] if "." in module else module


def parts_below(part: str) -> set[str]:
    """Set of parts that a part may import."""
    below = set(LAYERS[part].split())
    return below.union(*(parts_below(other) for other in below))


def module_name(path: pathlib.Path) -> str:
    """Name of a module under src."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(text: str, modules: Mapping[str, pathlib.Path]) -> Iterator[tuple[int, str]]:
    """Line numbers and names of torchpi's modules that a file imports, including inside functions."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # An imported name is a module, or is defined in one.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in full]
        for name in names:
            if name == "torchpi" or name.startswith("torchpi."):
                yield node.lineno, name


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components, by Kosaraju's algorithm)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: Mapping[str, set[str]], found: list[str]) -> None:
        seen.add(start)
        for other in sorted(edges.get(start, ())):
            if other not in seen:
                visit(other, edges, found)
        found.append(start)

    for module in graph:
        if module not in seen:
            visit(module, graph, order)
    reverse: dict[str, set[str]] = {module: set() for module in graph}
    for module, others in graph.items():
        for other in others & graph.keys():
            reverse[other].add(module)
    seen.clear()
    groups = []
    for module in reversed(order):
        if module not in seen:
            group: list[str] = []
            visit(module, reverse, group)
            groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


def report_sizes(root: pathlib.Path, package: Mapping[pathlib.Path, str]) -> None:
    """Print total lines, median file length and reading path with their targets."""
    lines = {path: text.count("\n") for path, text in package.items()}
    if not lines:
        return
    base = root / "src" / "torchpi"
    reading = sum(lines.get(base / f"{name}.py", 0) for name in READING_PATH)
    print(
        f"src/torchpi: {sum(lines.values())} lines (target {TARGET_LINES}), median file "
        f"{statistics.median(lines.values()):.0f} (target {TARGET_MEDIAN}), reading path {reading} lines (target 2500)"
    )


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1])))
