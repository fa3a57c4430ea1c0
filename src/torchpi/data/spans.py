"""Check of the episodes' positions in video files, against each other and against the frames of the files."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from torchpi.data import format as lerobot
from torchpi.data.clock import check_tolerance
from torchpi.data.metadata import Episode
from torchpi.errors import DatasetError, counted

Times = Float[np.ndarray, " n"]
"""Times of all frames of a file, in order, in seconds."""


class VideoSpans:
    """Spans of the episodes in video files, by from_timestamp and length. Only those of the selected episodes, which
    are read, must be right."""

    def __init__(
        self,
        episodes: Iterable[Episode],
        selected: Iterable[Episode],
        cameras: Collection[str],
        fps: float | int,
        tolerance_s: float | int | None,
    ) -> None:
        self._fps, self.tolerance_s = fps, check_tolerance(tolerance_s, fps)
        self._max_distance = min(self.tolerance_s, 0.49 / fps)  # beyond it, another frame is nearer
        self.counted_fps = fps if self._max_distance == self.tolerance_s else None
        """Frame rate for `VideoReader.frame_times`. None if the time of each frame must be read from the file, because
        reading a frame with this tolerance would not notice that it is off."""
        self._selected = frozenset(episode.index for episode in selected)
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
        """Refuse a file whose frames (`times()`) don't match its selected episodes' metadata. Checked once per file.

        The span of a selected episode must have as many frames as the episode, with the first and the last one at the
        right time. The file must contain the frames of its episodes, in order, and no others; or end with the last
        frame of the last episode, if an editor left frames between episodes. Frames of episodes without a span may
        follow.
        """
        if path in self._checked:
            return
        key, episodes = self._files[path]
        frame_times, fps = times(), self._fps
        if len(episodes) == 1 and len(frame_times) == episodes[0].length:  # fast path for v2.1, one episode per file
            distance = (
                np.array([frame_times[0], frame_times[-1] - (len(frame_times) - 1) / fps])
                - episodes[0].videos[key].from_timestamp
            )
            if np.abs(distance).max() <= self._max_distance and self.counted_fps is not None:
                self._checked.add(path)
                return
        starts = np.array([episode.videos[key].from_timestamp for episode in episodes], np.float64)
        lengths = np.array([episode.length for episode in episodes])
        ends = starts + (lengths - 1) / fps
        first, last = _nearest(frame_times, starts), _nearest(frame_times, ends)
        counts = last - first + 1
        distance = np.maximum(np.abs(frame_times[first] - starts), np.abs(frame_times[last] - ends))
        # Frame numbers by time: if a frame is missing, the others keep their numbers.
        numbers, total = np.rint((starts - frame_times[0]) * fps), round((frame_times[-1] - frame_times[0]) * fps) + 1
        contiguous = np.cumsum(lengths) - lengths  # numbers of the first frames without gaps
        has_gaps = total > lengths.sum() and numbers[-1] + lengths[-1] == total
        has_all = total == lengths.sum() or (total > lengths.sum() and key in self._unencoded)
        if self.counted_fps is None:
            for i in np.flatnonzero(counts == lengths).tolist():
                off = frame_times[first[i] : last[i] + 1] - starts[i] - np.arange(lengths[i]) / fps
                distance[i] = np.abs(off).max()
        fits = (distance <= self._max_distance) & (counts == lengths)
        fits &= (numbers == contiguous) & has_all | has_gaps
        for i in np.flatnonzero(~fits).tolist():
            if episodes[i].index in self._selected:
                expected = int(contiguous[i]) if total == lengths.sum() else None
                raise DatasetError(self._mismatch(path, frame_times, i, int(counts[i]), expected, float(distance[i])))
        self._checked.add(path)

    def _check_overlaps(self, path: Path, key: str, episodes: Sequence[Episode]) -> None:
        last, last_end = episodes[0], -np.inf
        for episode in episodes:
            start = episode.videos[key].from_timestamp
            end = start + episode.length / self._fps
            if last_end - start > 0.5 / self._fps and not self._selected.isdisjoint((episode.index, last.index)):
                raise DatasetError(
                    f"Episodes {last.index} and {episode.index} overlap in {path} ({key}): from "
                    f"{last.videos[key].from_timestamp:.4f} to {last_end:.4f} s and from {start:.4f} to {end:.4f} s, "
                    "by from_timestamp and length. One would get the other's images. Correct from_timestamp in "
                    f"{lerobot.EPISODES_FOLDER}, or {lerobot.leave_out('both')}."
                )
            if end > last_end:
                last, last_end = episode, end

    def _mismatch(self, path: Path, times: Times, i: int, count: int, number: int | None, distance: float) -> str:
        """The error message about the file's episode `i`, which has `count` frames in its span, the first or last one
        `distance` seconds off; `number` is that of its first frame, if the file has as many frames as its episodes."""
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
        if is_steady and abs(rate / fps - 1) > max(2e-4, 0.25 / len(times)):  # a quarter of a frame, at the end
            return (
                f"The video has {rate:.5g} frames per second, and {lerobot.INFO} states {fps:g}: {found}. Images would "
                "not match their frames. If the video's rate is right, correct fps and the timestamps; if not, encode "
                f"the video with {fps:g} frames per second."
            )
        leave_out = lerobot.LEAVE_OUT
        name = f"episode {episode.index}"
        if times[0] - start > self.tolerance_s:
            cause = f"from_timestamp of {name}, {start:.4f} s, is before the first frame"
        elif count != episode.length or (len(times) == total and number is None):
            cause = f"{name}, from {start:.4f} s (from_timestamp) on, has {count} frames instead of {episode.length}"
        elif distance > self._max_distance:
            limit = "the maximum of tolerance_s= is" if self.counted_fps is None else "tolerance_s= is"
            cause = (
                f"the frames of {name}, from {start:.4f} s (from_timestamp) on, are off by {distance:.4f} s, and "
                f"{limit} {self._max_distance:.4f} s"
            )
        elif number is not None:
            cause = f"from_timestamp of {name}, {start:.4f} s, is not the time of its first frame, number {number}"
        else:
            cause = f"which frames are missing or extra is unknown, so {name} may get the frames of others"
            indices = [episode.index for episode in episodes]
            leave_out = lerobot.leave_out(f"the episodes of this video, {min(indices)} to {max(indices)},")
        return (
            f"{found}; {cause}. Encode the video with all frames of its episodes and no others, correct "
            f"from_timestamp, or {leave_out}."
        )


def _nearest(times: Times, seconds: Float[np.ndarray, " e"]) -> Int[np.ndarray, " e"]:
    """The index of the nearest frame time, for each of `seconds`."""
    after = np.searchsorted(times, seconds).clip(1, max(1, len(times) - 1))
    is_after = np.abs(times[after % len(times)] - seconds) < np.abs(times[after - 1] - seconds)
    return after - 1 + is_after
