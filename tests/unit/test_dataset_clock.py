"""Clocks, tolerances, spans and rates: the right video frame, identified by the number in its pixels, or an error."""

from fractions import Fraction

import numpy as np
import pytest
from numbered_set import FRONT, V21, WRIST, encode, write_set, wrong_frames

from torchpi.data import LeRobotDataset

FILE = "videos/observation.images.front/chunk-000/file-000.mp4"
LENGTHS = (20, 15, 25)
NUMBERS = [1000 * e + f for e, length in enumerate(LENGTHS) for f in range(length)]


def opened(root, **options):
    return LeRobotDataset(root, action_horizon=2, **options)


def refused(root, match, **options):
    """Require an error when the dataset is opened, or, if only the video file shows it, when it is read or checked."""
    with pytest.raises(ValueError, match=match):
        opened(root, **options)[0]
    with pytest.raises(ValueError, match=match):
        opened(root, **options).check_videos()


# Clocks

JITTER = np.random.default_rng(0).uniform(-0.012, 0.012, 100)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize(
    ("clock", "clock_type"),
    [
        (lambda e, t: t + 1.0, "float32"),
        (lambda e, t: t + 3.3 * e, "float32"),  # one clock for the whole recording
        (lambda e, t: t - 0.5, "float32"),
        (lambda e, t: t + 3600, "float32"),  # resolution 0.24 ms
        (lambda e, t: t + 1.7e9 + 60 * e, "float64"),  # Unix time
        (lambda e, t: t + JITTER[: len(t)], "float32"),
    ],
)
def test_clocks_of_episodes_may_start_at_any_time(version, clock, clock_type, tmp_path):
    root = write_set(tmp_path / "set", version=version, clock=clock, clock_type=clock_type)
    assert not wrong_frames(opened(root))
    assert not wrong_frames(opened(root, episodes=[0, 1]))
    assert not wrong_frames(opened(root, episodes=[1, 2]))


def test_too_coarse_clock_is_an_error(tmp_path):
    root = write_set(tmp_path / "set", clock=lambda e, t: t + 1.7e9)
    refused(
        root, r"episode 0 starts at 1700000000 s, where float32 has a resolution of only 128 s; write it as float64"
    )


@pytest.mark.parametrize(
    ("clock", "message"),
    [
        (lambda e, t: t * 1e3, "seem to be in milliseconds"),
        (lambda e, t: t * 1e9, "seem to be in nanoseconds"),
        (lambda e, t: t / 3, r"frame 1 of episode 0 was taken 0\.0333 s .*The whole episode has 30\."),
        (lambda e, t: np.maximum(0, t - 0.1), r"frame 1 of episode 0 was taken 0\.0000 s"),  # twice the same
        (lambda e, t: t * 0, r"The whole episode has inf\."),
    ],
)
def test_clock_of_another_rate_is_an_error(clock, message, tmp_path):
    refused(write_set(tmp_path / "set", kind="image", clock=clock), message)


# Tolerances


@pytest.mark.parametrize(
    ("version", "tolerance"), [("v3.0", None), ("v3.0", 0.1), ("v3.0", 0.2), ("v3.0", 5), ("v2.1", 0.06), ("v2.1", 0.2)]
)
def test_nearest_frame_is_read_with_any_tolerance(version, tolerance, tmp_path):
    root = write_set(tmp_path / "set", version=version)
    dataset = opened(root, tolerance_s=tolerance)
    assert not wrong_frames(dataset)
    backwards = [dataset[i][FRONT] for i in range(len(dataset) - 1, -1, -1)]
    assert all(np.array_equal(image, dataset[i][FRONT]) for i, image in enumerate(reversed(backwards)))


@pytest.mark.parametrize("shift", [-0.045, 0.045, 0.055])
def test_uneven_clock_within_the_tolerance_does_not_change_frames(shift, tmp_path):
    root = write_set(tmp_path / "set", clock=lambda e, t: t + shift * (t > 0))
    assert not wrong_frames(opened(root, tolerance_s=0.06))
    refused(root, r"if its clock is uneven, allow more with tolerance_s=")


def test_uneven_video_within_the_tolerance_does_not_change_frames(tmp_path):
    """A camera that is early or late by up to 40 ms, seen in the times of the video."""
    times = np.arange(60) / 10 + np.random.default_rng(1).uniform(-0.04, 0.04, 60)
    times[0], times[-1] = 0, 5.86
    root = write_set(tmp_path / "set", videos={FRONT: {"times": times.tolist()}})
    assert not wrong_frames(opened(root, tolerance_s=0.045))
    with pytest.raises(ValueError, match=r"the frames of episode 2, .* are off by .*, and tolerance_s= is 0.0250 s"):
        wrong_frames(opened(root))


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), float("inf")])
def test_impossible_tolerances_are_errors(tolerance, tmp_path):
    refused(write_set(tmp_path / "set", kind="image"), "expected a positive number of seconds", tolerance_s=tolerance)


# Spans


def shifted(frames):
    """Shift the span of each episode by a number of frames."""

    def rows(found):
        for row, shift in zip(found, frames, strict=True):
            row[f"videos/{FRONT}/from_timestamp"] += shift / 10

    return rows


def test_episodes_may_have_any_order_in_a_file(tmp_path):
    root = write_set(tmp_path / "set", order=[2, 0, 1])
    assert not wrong_frames(opened(root))
    assert not wrong_frames(opened(root, episodes=[0, 2]))


@pytest.mark.parametrize("frames", [(0, -20, -35), (0, 0, -1), (0, 1, 0), (3, 0, 0), (0, 0, -30)])
def test_overlapping_episodes_are_an_error(frames, tmp_path):
    refused(write_set(tmp_path / "set", rows=shifted(frames)), r"overlap in .*file-000\.mp4 \(")


def test_overlap_of_other_episodes_is_ignored(tmp_path):
    root = write_set(tmp_path / "set", rows=shifted((0, 0, -3)))
    assert not wrong_frames(opened(root, episodes=[0]))
    refused(root, "Episodes 1 and 2 overlap in", episodes=[1])


@pytest.mark.parametrize(
    ("frames", "episodes", "message"),
    [
        (
            (0, 1, 2),
            [0, 1],
            "from_timestamp of episode 1, .* is not the time of its first frame, number 20",
        ),  # spans drift
        ((1, 2, 3), [0, 1], "from_timestamp of episode 0, .* is not the time of its first frame, number 0"),
        ((0, 0, 1), None, "episode 2, from 3.6000 s .* on, has 24 frames instead of 25"),
        ((0, 0.4, 0), None, "frames of episode 1, .* are off by 0.0400 s, and tolerance_s= is 0.0250 s"),
    ],
)
def test_spans_that_do_not_match_the_frames_are_errors(frames, episodes, message, tmp_path):
    root = write_set(tmp_path / "set", rows=shifted(frames))
    refused(root, message, episodes=episodes)


def test_video_that_starts_late_is_an_error(tmp_path):
    root = write_set(tmp_path / "set", videos={FRONT: {"times": [0.2 + i / 10 for i in range(60)]}})
    refused(root, r"from 0\.2000 to 6\.1000 s, .*; from_timestamp of episode 0, 0\.0000 s, is before the first frame")


@pytest.mark.parametrize(("late", "found"), [(0.06, 19), (0.2, 18)])
def test_no_tolerance_accepts_wrong_frames_of_a_late_video(late, found, tmp_path):
    """More than half a frame off is another frame, also in a file with one episode."""
    root = write_set(tmp_path / "set", version="v2.1")
    path = root / V21["video_path"].format(episode_chunk=0, episode_index=0, video_key=FRONT)
    encode(path, range(20), 10, times=[late + i / 10 for i in range(20)])
    refused(root, f"episode 0, .* has {found} frames instead of 20", tolerance_s=0.3)
    encode(path, range(20), 10, times=[0.04 + i / 10 for i in range(20)])
    assert not wrong_frames(opened(root, tolerance_s=0.3))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_no_tolerance_accepts_wrong_frames_of_an_uneven_video(version, tmp_path):
    """Frames 5 to 9 are so late that the previous frame is nearer to the expected time of each."""
    times = [i / 10 + 0.06 * (5 <= i < 10) for i in range(60)]
    root = write_set(tmp_path / "set", version=version, videos={FRONT: {"times": times}} if version == "v3.0" else {})
    if version == "v2.1":
        path = root / V21["video_path"].format(episode_chunk=0, episode_index=0, video_key=FRONT)
        encode(path, range(20), 10, times=times[:20])
    found = "frames of episode 0, .* are off by 0.0600 s, and the maximum of tolerance_s= is 0.0490 s"
    refused(root, found, tolerance_s=0.07)
    assert not wrong_frames(opened(root, tolerance_s=0.07, episodes=[1, 2]))


def test_rounded_starts_are_accepted(tmp_path):
    root = write_set(tmp_path / "set", fps=30, rows=lambda rows: [
        row.update({f"videos/{FRONT}/from_timestamp": round(row[f"videos/{FRONT}/from_timestamp"], 2)}) for row in rows
    ])  # fmt: skip
    assert not wrong_frames(opened(root))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            [*NUMBERS[:10], *NUMBERS[11:]],
            "has 59 frames .* its 3 episodes 60, 10 per second; ",
        ),  # one frame was not encoded
        (NUMBERS[:-1], "has 59 frames"),
        ([*NUMBERS, 9999], "has 61 frames"),
        (
            [*NUMBERS[:20], 9999, *NUMBERS[20:35], 9999, *NUMBERS[35:]],
            "has 62 frames",
        ),  # spans drift from the second on
    ],
)
def test_videos_with_missing_or_extra_frames_are_errors(numbers, message, tmp_path):
    root = write_set(tmp_path / "set", videos={FRONT: {"numbers": numbers}})
    refused(root, message)
    refused(root, message, episodes=[0])  # its frames can't be identified


@pytest.mark.parametrize("numbers", [list(range(19)), [*range(20), 20], []])
def test_video_of_one_episode_must_have_its_number_of_frames(numbers, tmp_path):
    root = write_set(tmp_path / "set", version="v2.1")
    encode(root / V21["video_path"].format(episode_chunk=0, episode_index=0, video_key=FRONT), numbers or [0], 10)
    refused(root, rf"has {len(numbers) or 1} frames? .* its episode 20")
    assert not wrong_frames(opened(root, episodes=[1, 2]))


def test_frames_of_a_deleted_episode_may_stay_in_the_video(tmp_path):
    """Episode 1 of 4 was removed from the metadata."""
    numbers = [*NUMBERS[:20], *range(9000, 9007), *NUMBERS[20:]]
    root = write_set(tmp_path / "set", rows=shifted((0, 7, 7)), videos={FRONT: {"numbers": numbers}})
    assert not wrong_frames(opened(root))
    numbers = [*range(9000, 9007), *NUMBERS]
    root = write_set(tmp_path / "first", rows=shifted((7, 7, 7)), videos={FRONT: {"numbers": numbers}})
    assert not wrong_frames(opened(root))


def test_frames_of_an_episode_without_a_span_may_follow(tmp_path):
    """As after a recording that ended before the metadata of its last episode were complete."""

    def unencoded(rows):
        rows[2][f"videos/{FRONT}/from_timestamp"] = None

    root = write_set(tmp_path / "set", rows=unencoded)
    assert not wrong_frames(opened(root, episodes=[0, 1]))


def test_missing_frame_that_left_a_gap_does_not_affect_other_episodes(tmp_path):
    gap = [i for i in range(60) if i != 25]  # a frame of episode 1
    video = {"numbers": [NUMBERS[i] for i in gap], "times": [i / 10 for i in gap]}
    root = write_set(tmp_path / "set", videos={FRONT: video})
    assert not wrong_frames(opened(root, episodes=[0, 2]))
    refused(root, "episode 1, from 2.0000 s .* on, has 14 frames instead of 15")


def test_each_camera_is_checked_against_its_own_spans(tmp_path):
    cameras = (FRONT, WRIST)
    rows = shifted((0, 7, 7))  # spans of the front camera
    numbers = [*NUMBERS[:20], *range(9000, 9007), *NUMBERS[20:]]
    good = write_set(tmp_path / "good", cameras=cameras, rows=rows, videos={FRONT: {"numbers": numbers}})
    assert not wrong_frames(opened(good))
    bad = write_set(tmp_path / "bad", cameras=cameras, videos={WRIST: {"numbers": NUMBERS[1:]}})
    refused(bad, r"observation\.images\.wrist\) has 59 frames")
    assert not wrong_frames(opened(bad, cameras=[FRONT]))


# Rates of videos


@pytest.mark.parametrize(
    ("fps", "video_fps", "lengths", "version"),
    [
        (29, 30, (60,), "v2.1"),
        (29.97, 30, (400,), "v2.1"),
        (15, 30, (20, 20, 20, 20), "v3.0"),  # the last one is not selected
        (30, 15, (20, 20, 20, 20), "v3.0"),
        (30, 24, (40, 40), "v2.1"),
    ],
)
def test_video_of_another_rate_is_an_error(fps, video_fps, lengths, version, tmp_path):
    root = write_set(tmp_path / "set", lengths, fps=fps, version=version, videos={FRONT: {"fps": video_fps}}) \
        if version == "v3.0" else write_set(tmp_path / "set", lengths, fps=fps, version=version)  # fmt: skip
    if version == "v2.1":
        path = V21["video_path"].format(episode_chunk=0, episode_index=0, video_key=FRONT)
        encode(root / path, range(lengths[0]), video_fps)
    refused(root, rf"video has {video_fps} frames per second, and meta/info\.json states {fps}:", episodes=[0])


@pytest.mark.parametrize("rate", [Fraction(30_000, 1001), Fraction(2997, 100)])
def test_camera_of_29_97_frames_per_second_is_accepted(rate, tmp_path):
    root = write_set(tmp_path / "set", (200, 30), fps=29.97, videos={FRONT: {"fps": rate}})
    assert not wrong_frames(opened(root))


def test_short_video_may_be_off_by_less_than_the_tolerance(tmp_path):
    """30 instead of 29.97 frames per second: off by a tenth of a frame after 100 frames."""
    root = write_set(tmp_path / "set", (60, 40), fps=29.97, videos={FRONT: {"fps": 30}})
    assert not wrong_frames(opened(root))


def test_each_file_is_checked_once(tmp_path, monkeypatch):
    from torchpi.data.video import VideoPool

    looked_at = []
    times = VideoPool.frame_times
    monkeypatch.setattr(VideoPool, "frame_times", lambda *args: looked_at.append(args[1]) or times(*args))
    dataset = opened(write_set(tmp_path / "set"))
    dataset.check_videos()
    wrong_frames(dataset)
    assert [path.as_posix().endswith(FILE) for path in looked_at] == [True]
