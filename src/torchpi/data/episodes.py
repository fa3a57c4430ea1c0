"""Selection of episodes by number or task, and of episodes to hold out from training."""

import fnmatch
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from torchpi.data.metadata import Episode, open_metadata
from torchpi.errors import DatasetError, first_of

_TASK = "task:"
_TASKS_SHOWN = 20
_RANGE = re.compile(r"(?P<number>\d+)|(?P<start>\d*):(?P<stop>\d*)")


def select_episodes(dataset: str | Path, expression: str) -> list[int]:
    """Select episodes by an expression.

        select_episodes("my_set", "0:40, 57, 100:")           # 0 to 39, 57, and from 100 on
        select_episodes("my_set", "task: open the *")         # instructions that start with "open the"
        select_episodes("my_set", "0:400; task: open *|close *")  # among the first 400, those that open or close

    An episode must meet all conditions, which are separated by ";". Numbers and ranges are separated by ","; as in
    Python, a range excludes its second number. Task patterns use shell wildcards (*, ?, [abc]), match the whole
    instruction, ignore case, and are separated by "|".

    Args:
        dataset: a folder, or hf://org/name[@revision].
        expression: the conditions.

    Returns:
        The indices of the episodes.

    Raises:
        ValueError: a malformed expression; an unknown number; a pattern without a match; no episode meets all.
        FileNotFoundError, ValueError: see `open_metadata`.
    """
    metadata = open_metadata(dataset)
    indices = [episode.index for episode in metadata.episodes]
    selected = set(indices)
    for condition in (part.strip() for part in expression.split(";")):
        if condition.startswith(_TASK):
            selected &= _select_tasks(metadata.episodes, condition.removeprefix(_TASK))
        else:
            selected &= _select_numbers(indices, condition)
    if not selected:
        raise DatasetError(f"No episode of {metadata.root} meets all conditions of {expression!r}.")
    return sorted(selected)


def hold_out(tasks: Sequence[Hashable], share: float, rng: np.random.Generator) -> list[int]:
    """Select random episodes for evaluation, stratified by task.

    Shares are rounded by Sainte-Laguë's method, as seats of a parliament: within each task, episodes are shuffled and
    ranked by their relative position, and the episodes with the lowest ranks are held out, at least one. One episode
    per task is always kept for training. If no two episodes have the same task, tasks are ignored.

    Args:
        tasks: the task of each episode.
        share: fraction of the episodes to hold out.

    Returns:
        Sorted positions in `tasks`; fewer than the share if tasks have single episodes.
    """
    if len(tasks) < 2:
        raise DatasetError(f"Expected at least two episodes to hold some out, got {len(tasks)}.")
    if len(set(tasks)) == len(tasks):
        tasks = [None] * len(tasks)
    totals, seen = Counter(tasks), Counter[Hashable]()
    candidates = []
    for position in rng.permutation(len(tasks)).tolist():
        task = tasks[position]
        seen[task] += 1
        if seen[task] < totals[task]:
            candidates.append(((seen[task] - 0.5) / totals[task], position))
    candidates.sort(key=lambda candidate: candidate[0])  # stable: ties stay in random order
    return sorted(position for _, position in candidates[: max(1, round(share * len(tasks)))])


def _select_numbers(indices: Sequence[int], condition: str) -> set[int]:
    available = f"the episodes are {indices[0]} to {indices[-1]}"
    selected: set[int] = set()
    for part in (part.strip() for part in condition.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise DatasetError(
                f"{part!r} does not select episodes; expected a number, a range such as 0:40 or 100:, or task:PATTERN; "
                f"{available}."
            )
        start = int(match["number"] or match["start"] or indices[0])
        stop = start + 1 if match["number"] else int(match["stop"] or indices[-1] + 1)
        found = {index for index in indices if start <= index < stop}
        if not found or stop > indices[-1] + 1:
            raise DatasetError(f"Not all episodes of {part!r} exist; {available}.")
        selected |= found
    return selected


def _select_tasks(episodes: Sequence[Episode], patterns: str) -> set[int]:
    selected: set[int] = set()
    for pattern in (pattern.strip() for pattern in patterns.split("|")):
        found = {
            episode.index
            for episode in episodes
            if any(fnmatch.fnmatchcase(task.lower(), pattern.lower()) for task in episode.tasks)
        }
        if not found:
            counts = Counter(task for episode in episodes for task in episode.tasks).most_common()
            tasks = first_of([f"{task!r} ({count} episodes)" for task, count in counts], _TASKS_SHOWN)
            raise DatasetError(f"No task matches {pattern!r}; the tasks are {tasks}.")
        selected |= found
    return selected
