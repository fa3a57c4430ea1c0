"""Choosing episodes: by number, by task, and those to hold out of a training."""

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
    """Choose episodes by an expression; the result are their indices.

        select_episodes("my_set", "0:40, 57, 100:")           # 0 to 39, 57, and from 100 on
        select_episodes("my_set", "task: open the *")         # whose instruction begins so
        select_episodes("my_set", "0:400; task: open *|close *")  # of the first 400 those that open or close

    Conditions are separated by ";", and an episode has to meet all of them. Numbers and ranges are separated by ",";
    as in Python, a range ends before its second number. A task's pattern is a shell's (*, ?, [abc]), matches the whole
    instruction, and takes capital and small letters alike; several are separated by "|".

    Args:
        dataset: a folder, or hf://org/name[@revision].
        expression: the conditions.

    Raises:
        ValueError: malformed; a number that isn't there; a pattern that no instruction matches; nothing meets all.
        FileNotFoundError, ValueError: see `open_metadata`.
    """
    metadata = open_metadata(dataset)
    conditions = [part.strip() for part in expression.split(";")]
    chosen = {episode.index for episode in metadata.episodes}
    for condition in conditions:
        if condition.startswith(_TASK):
            chosen &= _of_tasks(metadata.episodes, condition.removeprefix(_TASK))
        else:
            chosen &= _of_numbers([episode.index for episode in metadata.episodes], condition)
    if not chosen:
        raise DatasetError(f"No episode of {metadata.root} meets all conditions of {expression!r}.")
    return sorted(chosen)


def hold_out(tasks: Sequence[Hashable], share: float, rng: np.random.Generator) -> list[int]:
    """Choose episodes to measure a training with, from all tasks alike.

    Each task gives its share, rounded as parliaments round seats (Sainte-Laguë's method): episodes are ordered by how
    far they are in their own task, in random order, and the first ones are taken, at least one. A task's last episode
    is never taken, so that each is trained on; where no two episodes have the same task, the tasks are not looked at.

    Returns:
        The episodes' positions in `tasks`, sorted; fewer than the share where tasks have single episodes.
    """
    if len(tasks) < 2:
        raise DatasetError(f"Expected two episodes or more, of which some are held out, got {len(tasks)}.")
    if len(set(tasks)) == len(tasks):
        tasks = [None] * len(tasks)
    totals, seen = Counter(tasks), Counter[Hashable]()
    candidates = []
    for position in rng.permutation(len(tasks)).tolist():
        task = tasks[position]
        seen[task] += 1
        if seen[task] < totals[task]:
            candidates.append(((seen[task] - 0.5) / totals[task], position))
    candidates.sort(key=lambda candidate: candidate[0])  # stable: equal ones stay in random order
    return sorted(position for _, position in candidates[: max(1, round(share * len(tasks)))])


def _of_numbers(indices: Sequence[int], condition: str) -> set[int]:
    there = f"the episodes are {indices[0]} to {indices[-1]}"
    chosen: set[int] = set()
    for part in (part.strip() for part in condition.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise DatasetError(
                f"{part!r} chooses no episodes; expected a number, a range such as 0:40 or 100:, or task:PATTERN; "
                f"{there}."
            )
        start = int(match["number"] or match["start"] or indices[0])
        stop = start + 1 if match["number"] else int(match["stop"] or indices[-1] + 1)
        found = {index for index in indices if start <= index < stop}
        if not found or stop > indices[-1] + 1:
            raise DatasetError(f"Not all episodes of {part!r} are there; {there}.")
        chosen |= found
    return chosen


def _of_tasks(episodes: Sequence[Episode], patterns: str) -> set[int]:
    chosen: set[int] = set()
    for pattern in (pattern.strip() for pattern in patterns.split("|")):
        found = {
            episode.index
            for episode in episodes
            if any(fnmatch.fnmatchcase(task.lower(), pattern.lower()) for task in episode.tasks)
        }
        if not found:
            counts = Counter(task for episode in episodes for task in episode.tasks)
            there = first_of([f"{task!r} ({count} episodes)" for task, count in counts.most_common()], _TASKS_SHOWN)
            raise DatasetError(f"No task matches {pattern!r}; there are {there}.")
        chosen |= found
    return chosen
