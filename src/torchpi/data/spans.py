"""The places of episodes in video files, compared with each other and with the frames that the files have."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from torchpi.data import format as lerobot
from torchpi.data.clock import check_tolerance
from torchpi.data.metadata import Episode
from torchpi.errors import DatasetError, counted

Times = Float[np.ndarray, " n"]
"""Of all frames of a file, in order, in seconds."""


class VideoSpans:
    """The parts of video files that the episodes of a dataset have, by from_timestamp and length; those of the chosen
    ones, which are read, have to be right."""

    def __init__(
        self,
        episodes: Iterable[Episode],
        chosen: Iterable[Episode],
        cameras: Collection[str],
        fps: float | int,
        tolerance_s: float | int | None,
    ) -> None:
        self._fps, self.tolerance_s = fps, check_tolerance(tolerance_s, fps)
        self._allowed = min(self.tolerance_s, 0.49 / fps)  # farther off, the nearest is another frame
        self.counted_fps = fps if self._allowed == self.tolerance_s else None
        """The rate at which a file's frames may be counted, see `frame_times`; None: reading would not find that one of
        them is off, so that the time of each is needed."""
        self._chosen = frozenset(episode.index for episode in chosen)
        self._files: dict[Path, tuple[str, list[Episode]]] = {}
        self._checked: set[Path] = set()
        self._unencoded: set[str] = set()  # cameras of which some episodes have no span
        for episode in episodes:
            self._unencoded.update(key for key in cameras if key not in episode.videos)
            for key in cameras:
                if (span := episode.videos.get(key)) is not None and episode.length:
                    self._files.setdefault(span.path, (key, []))[1].append(episode)
        for path, (key, in_file) in self._files.items():
            in_file.sort(key=lambda episode: episode.videos[key].from_timestamp)
            self._check_overlaps(path, key, in_file)

    def check(self, path: Path, times: Callable[[], Times]) -> None:
        """Refuse a file in which a chosen episode's frames aren't where its metadata say, or may be another's.

        Every chosen episode's part has as many frames as the episode, the first and the last one in their places. The
        file has those of its episodes, one behind the other, and no others; or the last episode ends with the last
        frame, where an editor has left frames between them. Frames of an episode that has no span may follow. A file is
        checked once.
        """
        if path in self._checked:
            return
        key, episodes = self._files[path]
        found, fps = times(), self._fps
        if len(episodes) == 1 and len(found) == episodes[0].length:  # in v2.1 every file: quickly
            off = np.array([found[0], found[-1] - (len(found) - 1) / fps]) - episodes[0].videos[key].from_timestamp
            if np.abs(off).max() <= self._allowed and self.counted_fps is not None:
                self._checked.add(path)
                return
        starts = np.array([episode.videos[key].from_timestamp for episode in episodes], np.float64)
        lengths = np.array([episode.length for episode in episodes])
        ends = starts + (lengths - 1) / fps
        first, last = _nearest(found, starts), _nearest(found, ends)
        counts = last - first + 1
        distance = np.maximum(np.abs(found[first] - starts), np.abs(found[last] - ends))
        # In frames of the dataset's rate: where one is missing, the others are still in their places.
        place = np.rint((starts - found[0]) * fps)
        total, in_turn = round((found[-1] - found[0]) * fps) + 1, np.cumsum(lengths) - lengths
        has_gaps = total > lengths.sum() and place[-1] + lengths[-1] == total
        has_all = total == lengths.sum() or (total > lengths.sum() and key in self._unencoded)
        if self.counted_fps is None:
            for i in np.flatnonzero(counts == lengths).tolist():
                off = found[first[i] : last[i] + 1] - starts[i] - np.arange(lengths[i]) / fps
                distance[i] = np.abs(off).max()
        fits = (distance <= self._allowed) & (counts == lengths)
        fits &= (place == in_turn) & has_all | has_gaps
        for i in np.flatnonzero(~fits).tolist():
            if episodes[i].index in self._chosen:
                place_in_turn = int(in_turn[i]) if total == lengths.sum() else None
                raise DatasetError(self._explained(path, found, i, int(counts[i]), place_in_turn, float(distance[i])))
        self._checked.add(path)

    def _check_overlaps(self, path: Path, key: str, episodes: Sequence[Episode]) -> None:
        last, last_end = episodes[0], -np.inf
        for episode in episodes:
            start = episode.videos[key].from_timestamp
            end = start + episode.length / self._fps
            if last_end - start > 0.5 / self._fps and not self._chosen.isdisjoint((episode.index, last.index)):
                raise DatasetError(
                    f"Episodes {last.index} and {episode.index} have the same part of {path} ({key}): from "
                    f"{last.videos[key].from_timestamp:.4f} to {last_end:.4f} s and from {start:.4f} to {end:.4f} s, "
                    "by from_timestamp and length. One would be shown the other's images. Correct from_timestamp in "
                    f"{lerobot.EPISODES_FOLDER}, or {lerobot.LEAVE_OUT.replace('the episode', 'both')}."
                )
            if end > last_end:
                last, last_end = episode, end

    def _explained(self, path: Path, times: Times, i: int, count: int, in_turn: int | None, distance: float) -> str:
        """The error of the file's episode `i`, with `count` frames in its part, of which the first or the last one is
        off by `distance` seconds; `in_turn`: frames before it, if the file has as many as all episodes."""
        (key, episodes), fps = self._files[path], self._fps
        episode, total = episodes[i], sum(episode.length for episode in episodes)
        steps = np.diff(times) if len(times) > 1 else np.array([1 / fps])
        rate = 1 / float(np.median(steps))
        is_steady = np.mean(np.abs(steps * rate - 1) < 0.05) > 0.9
        start = episode.videos[key].from_timestamp
        found = (
            f"{path} ({key}) has {counted(len(times), 'frame')} from {times[0]:.4f} to {times[-1]:.4f} s, and its "
            f"{'episode' if len(episodes) == 1 else counted(len(episodes), 'episode')} {total}, {fps:g} per second"
        )
        if is_steady and abs(rate / fps - 1) > max(2e-4, 0.25 / len(times)):  # of a frame, at the end
            return (
                f"The video has {rate:.5g} frames per second, and {lerobot.INFO} says {fps:g}: {found}. Images would "
                "be those of another moment. If the video's rate is true, correct fps and the timestamps; if not, "
                f"encode the video with {fps:g} frames per second."
            )
        left_out = lerobot.LEAVE_OUT
        if times[0] - start > self.tolerance_s:
            cause = f"{start:.4f} s (from_timestamp), which is before its first frame, is said to be the first one"
        elif count != episode.length or (len(times) == total and in_turn is None):
            cause = f"from {start:.4f} s on (from_timestamp) it has {count} in place of the {episode.length} frames"
        elif distance > self._allowed:
            allows = "no tolerance_s= allows for more than" if self.counted_fps is None else "tolerance_s= allows for"
            cause = (
                f"from {start:.4f} s on (from_timestamp) frames are off by {distance:.4f} s, and {allows} "
                f"{self._allowed:.4f} s, in those"
            )
        elif in_turn is not None:
            cause = f"{start:.4f} s (from_timestamp) isn't the time of frame {in_turn}, the first one"
        else:
            cause = "which frames are missing or too many isn't known, so that others may be taken for those"
            indices = [episode.index for episode in episodes]
            left_out = left_out.replace("the episode", f"the episodes of this video, {min(indices)} to {max(indices)},")
        return (
            f"{found}; {cause} of episode {episode.index}. Encode the video with all frames of its episodes and no "
            f"others, correct from_timestamp, or {left_out}."
        )


def _nearest(times: Times, seconds: Float[np.ndarray, " e"]) -> Int[np.ndarray, " e"]:
    """The index of the time that is nearest to each."""
    after = np.searchsorted(times, seconds).clip(1, max(1, len(times) - 1))
    is_after = np.abs(times[after % len(times)] - seconds) < np.abs(times[after - 1] - seconds)
    return after - 1 + is_after
