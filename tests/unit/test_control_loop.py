"""The control loop of torchpi-client: a toy robot, a scripted policy and a virtual clock."""

import collections
import concurrent.futures
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from rrd_helpers import rows

from torchpi.policy import load_policy
from torchpi.robots import get_embodiment
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi_client import ActionLimits, ControlLoop, ControlSettings, RerunLog, Robot, ServerError, WebsocketPolicy
from torchpi_client.clock import MonotonicClock, Pacer
from torchpi_client.inference import Answer, BackgroundInference
from torchpi_client.latency import LatencyEstimate
from torchpi_client.protocol import RTC
from torchpi_client.report import format_chunk
from torchpi_client.resample import resample, stretch
from torchpi_client.schedule import ActionQueue, Ensemble

HZ, HORIZON = 10.0, 8


class VirtualClock:
    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def sleep_until(self, moment):
        self.time = max(self.time, moment)


class ToyRobot:
    """Robot that moves to each command immediately and observes it as its state."""

    def __init__(self, clock, dims=1, busy=None):
        self.clock = clock
        self.dims = dims
        self.busy = collections.defaultdict(float, busy or {})  # duration in seconds by the index of the command
        self.commands = []
        self.times = []
        self.observed = 0

    def observe(self):
        self.observed += 1
        return {"state": np.array(self.commands[-1] if self.commands else np.zeros(self.dims))}

    def act(self, action):
        assert action.dtype == np.float32
        self.clock.time += self.busy[len(self.commands)]
        self.commands.append(action)
        self.times.append(self.clock.time)

    @property
    def positions(self):
        return [round(float(command[0]), 4) for command in self.commands]


class ScriptedPolicy:
    """Chunk n is 100·n + 0, 1, 2, … in dimension 0. The warm-up has chunks -2 and -1 with rtc, and -1 otherwise."""

    def __init__(self, chunks=None, **metadata):
        kinds = metadata.pop("action_commands", ["position"])
        self.metadata = {
            "control_hz": HZ,
            "action_commands": kinds,
            "action_names": list("abcdefg")[: len(kinds)],
            **metadata,
        }
        self.chunks = chunks or (lambda number: 100 * number + np.arange(HORIZON, dtype=np.float32)[:, None])
        self.requests = []
        self.warm_ups = 2 if metadata.get(RTC) else 1

    def infer(self, observation):
        self.requests.append(observation)
        chunk = self.chunks(len(self.requests) - 1 - self.warm_ups)
        if isinstance(chunk, Exception):
            raise chunk
        return {"actions": np.asarray(chunk, np.float32)}


class VirtualInference:
    """Inference whose answers take `latencies` seconds in turn; the last value repeats."""

    def __init__(self, policy, clock, latencies):
        self.policy, self.clock, self.latencies = policy, clock, list(latencies)
        self.pending = None

    @property
    def busy(self):
        return self.pending is not None

    def start(self, observation):
        assert not self.busy
        latency = self.latencies.pop(0) if len(self.latencies) > 1 else self.latencies[0]
        try:
            self.pending = Answer(self.policy.infer(observation), None, self.clock.time + latency)
        except Exception as error:
            self.pending = Answer(None, error, self.clock.time + latency)

    def poll(self):
        if self.pending is None or self.pending.finished > self.clock.time + 1e-9:
            return None
        answer, self.pending = self.pending, None
        return answer

    def wait(self, seconds):
        self.clock.sleep_until(self.pending.finished)
        return self.poll()


def controlled(policy, *, latencies=(0.0,), steps=20, busy=None, seconds=None, on_chunk=None, log=None, **settings):
    """Run the loop; return the robot and the report."""
    clock = VirtualClock()
    robot = ToyRobot(clock, len(policy.metadata["action_commands"] or "?"), busy)
    loop = ControlLoop(
        robot,
        policy,
        ControlSettings(**settings),
        clock=clock,
        inference=VirtualInference(policy, clock, latencies),
        on_chunk=on_chunk,
        log=log,
    )
    report = loop.run(seconds=seconds, steps=None if seconds else steps)
    return robot, report


def test_log_gets_observations_chunks_and_commands_at_their_times(tmp_path):
    observation = {"cameras": [], "state": [{"key": "state", "names": ["lift"], "units": ["m"]}]}
    policy, target = ScriptedPolicy(observation=observation, execute_steps=4), tmp_path / "run.rrd"
    with RerunLog(target, wait=True) as log:
        robot, _ = controlled(policy, latencies=[0.0, 0.2], steps=12, mode="async", log=log.robot(policy.metadata))
    executed = rows(target, "/action/a")
    assert [value for _, _, value in executed] == robot.positions
    assert [frame - executed[0][0] for frame, _, _ in executed] == [
        round(HZ * (time - robot.times[0])) for time in robot.times
    ]
    chunks = [rows(target, f"/predicted/a/{lane}") for lane in range(2)]
    assert [value for _, _, value in chunks[1][:-1]] == list(range(100, 100 + HORIZON))
    begin = chunks[1][0][1]  # time of chunk 1's observation; the action at that time is from chunk 0
    assert [seconds for _, seconds, _ in chunks[1]] == pytest.approx(begin + np.arange(HORIZON + 1) / HZ)
    assert begin in [seconds for _, seconds, _ in rows(target, "/state/lift")]


def test_runs_with_one_log_follow_each_other_and_chunks_have_the_loops_rate(tmp_path, monkeypatch):
    policy, target = ScriptedPolicy(), tmp_path / "run.rrd"
    with RerunLog(target, wait=True) as log:
        for began in (0.0, 60.0):
            monkeypatch.setattr(RerunLog, "seconds", began)
            rate = {"control_hz": 2 * HZ, "resample": "as_is"}
            controlled(policy, steps=4, mode="sync", log=log.robot(policy.metadata), **rate)
    executed = [seconds for _, seconds, _ in rows(target, "/action/a")]
    assert executed == sorted(executed)
    assert executed[-1] == pytest.approx(executed[len(executed) // 2 - 1] + 60)
    chunk = rows(target, "/predicted/a/0")
    steps = [b - a for (_, a, _), (_, b, _) in itertools.pairwise(chunk[: HORIZON + 1])]
    assert steps == pytest.approx([1 / (2 * HZ)] * HORIZON)


# ---- modes ----


def test_sync_executes_execute_steps_and_holds_between_chunks():
    policy = ScriptedPolicy(execute_steps=3)
    robot, report = controlled(policy, latencies=(5.0, 0.15), steps=16)
    # Before the first chunk nothing is sent; between chunks the last command is repeated.
    assert robot.positions == [0, 1, 2, 2, 2, 100, 101, 102, 102, 102, 200, 201, 202, 202]
    assert (report.actions, report.waits, report.holds, report.chunks) == (9, 7, 0, 3)
    assert (report.discarded.largest, report.late_chunks) == (0, 0)
    assert isinstance(robot, Robot)


def test_async_executes_the_chunk_during_inference():
    robot, report = controlled(ScriptedPolicy(execute_steps=4), mode="async", latencies=(5.0, 0.25), steps=17)
    # The observation was made before action 4; three steps later, actions 4, 5 and 6 of chunk 0 have been executed.
    assert robot.positions == [0, 1, 2, 3, 4, 5, 6, 103, 104, 105, 106, 203, 204, 205]
    assert report.discarded.total == 0 + 3 + 3
    assert (report.holds, report.late_chunks, report.actions) == (0, 0, 14)


def test_first_chunk_discards_no_action():
    robot, report = controlled(ScriptedPolicy(execute_steps=4), mode="async", latencies=(0.0, 0.7), steps=9)
    assert robot.positions == [0, 1]
    assert (report.waits, report.discarded.total) == (7, 0)


def test_discarded_counts_executed_actions_not_elapsed_time():
    # Seven steps pass, but only the four remaining actions could be executed.
    policy = ScriptedPolicy(execute_steps=4)
    robot, report = controlled(policy, mode="async", latencies=(0.0, 0.1, 0.65), steps=14, max_age=10)
    assert robot.positions[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert robot.positions[8:] == [7, 7, 7, 104, 105]
    assert (report.discarded.largest, report.holds, report.late_chunks) == (4, 3, 1)


def test_chunk_with_only_past_steps_keeps_the_current_chunk():
    queue = ActionQueue(2)
    queue.arrive(queue.request(), np.arange(8.0)[:, None])
    for _ in range(2):
        queue.next()
    request = queue.request()
    for _ in range(3):
        queue.next()
    assert queue.arrive(request, np.full((3, 1), 100.0)) is None
    assert queue.next() == [5]
    assert queue.due
    assert queue.arrive(request, np.arange(100.0, 106)[:, None]) == 4
    assert queue.next() == [104]


def test_ensemble_averages_overlapping_chunks_per_step():
    decay = 0.5
    robot, report = controlled(
        ScriptedPolicy(lambda number: np.full((4, 1), number, np.float32)),
        mode="ensemble",
        ensemble_decay=decay,
        latencies=(0.0, 0.05),
        steps=7,
    )

    def average(*values):  # oldest first
        weights = np.exp(-decay * np.arange(len(values)))
        return round(float(weights @ values / weights.sum()), 4)

    # Each chunk arrives one step after its request, so except for chunk 0 its first action is never used.
    expected = [0, average(0), average(0, 1), average(0, 1, 2), average(1, 2, 3), average(2, 3, 4)]
    assert robot.positions[:1] == expected[:1]
    np.testing.assert_allclose(robot.positions, expected, atol=1e-4)
    assert report.discarded.largest == 1


def test_ensemble_refuses_chunk_with_only_past_steps():
    ensemble = Ensemble()
    first = ensemble.request()
    ensemble.arrive(first, np.zeros((4, 1)))
    for _ in range(3):
        ensemble.next()
    assert ensemble.arrive(first, np.ones((3, 1))) is None
    assert ensemble.next() == [0]
    assert ensemble.next() is None


# ---- real-time chunking ----


def rtc_policy(**metadata):
    return ScriptedPolicy(**{"execute_steps": 4, RTC: True, **metadata})


def test_rtc_sends_rest_of_chunk_at_start_of_inference():
    policy = rtc_policy()
    robot, report = controlled(policy, mode="rtc", latencies=(9.0, 9.0, 0.25), steps=17)
    warm_up, guided_warm_up, first, second, third = (request.get(RTC) for request in policy.requests[:5])
    assert warm_up is None
    assert guided_warm_up["action_prefix"].shape == (HORIZON - 1, 1)
    assert first is None  # there is no previous chunk
    # The rest begins at the time of the observation, with action 4, and is not padded to the horizon.
    assert second["action_prefix"].tolist() == [[4], [5], [6], [7]]
    assert (second["delay"], second["execution_horizon"]) == (3, 4)
    assert second["action_prefix"].dtype == np.float32
    # The observation is from the same time.
    assert policy.requests[3]["state"] == [3]
    # Chunk 1 began with its action 3; one more was executed until the next request.
    assert third["action_prefix"].tolist() == [[104], [105], [106], [107]]
    assert third["execution_horizon"] == 4
    assert robot.positions == [0, 1, 2, 3, 4, 5, 6, 103, 104, 105, 106, 203, 204, 205]
    assert report.late_chunks == 0


def test_rtc_delay_is_at_most_the_rest_of_the_chunk():
    policy = rtc_policy(execute_steps=6)
    robot, report = controlled(policy, mode="rtc", latencies=(0.0, 0.0, 0.5), steps=20, max_age=10)
    second = policy.requests[3][RTC]
    assert (second["delay"], len(second["action_prefix"]), second["execution_horizon"]) == (2, 2, 6)
    # All remaining actions are executed, then the robot is held; the new chunk continues after them.
    assert robot.positions[6:13] == [6, 7, 7, 7, 7, 102, 103]
    assert report.discarded.largest == 2


def test_rtc_prefix_ends_before_nan():
    def chunks(number):
        chunk = 100.0 * number + np.arange(HORIZON)[:, None]
        chunk[6] = np.nan
        return chunk

    policy = ScriptedPolicy(chunks, execute_steps=4, **{RTC: True})
    _, report = controlled(policy, mode="rtc", on_invalid="hold", latencies=(0.0, 0.0, 0.25), steps=12)
    assert policy.requests[3][RTC]["action_prefix"].tolist() == [[4], [5]]
    assert report.invalid.tolist() == [1]


def test_rtc_without_server_support_is_refused():
    with pytest.raises(ValueError, match=r'doesn\'t support torchpi/rtc.*mode "async"'):
        controlled(ScriptedPolicy(), mode="rtc")
    policy = ScriptedPolicy(execute_steps=4)
    controlled(policy, mode="async")
    assert all(RTC not in request for request in policy.requests)


def test_latency_excludes_warm_up():
    policy = rtc_policy()
    _, report = controlled(policy, mode="rtc", latencies=(30.0, 20.0, 0.1), steps=12)
    assert policy.requests[3][RTC]["delay"] == 1
    assert report.latency.largest == pytest.approx(0.1)


def test_warm_up_is_repeated_after_missed_deadline(caplog):
    policy = ScriptedPolicy(lambda number: TimeoutError("compiling") if number < 2 else np.full((8, 1), number))
    robot, report = controlled(policy, latencies=(1.0, 1.0, 1.0, 0.0), steps=3)
    assert robot.positions[0] == 3  # from the first chunk after the warm-up
    assert report.failed_requests == 0
    policy = ScriptedPolicy(lambda number: TimeoutError("no answer"))
    with pytest.raises(TimeoutError, match="no answer"):
        controlled(policy, latencies=(100.0,))
    assert len(policy.requests) == 7
    assert [record.message.count("compilation") for record in caplog.records] == [1, 1]  # once per run


@pytest.mark.parametrize("answers", [False, True])
def test_stop_during_warm_up_ends_run_without_command(answers):
    """Stop while the first inference hangs, and while it misses its deadline repeatedly."""
    requested, free = threading.Event(), threading.Event()

    def chunk(number):
        requested.set()
        if answers:
            return TimeoutError("compiling")
        free.wait()
        return np.zeros((8, 1))

    robot = ToyRobot(MonotonicClock())
    loop = ControlLoop(robot, ScriptedPolicy(chunk), ControlSettings())
    reports = []
    thread = threading.Thread(target=lambda: reports.append(loop.run(seconds=300)))
    thread.start()
    requested.wait()
    loop.stop()
    thread.join(timeout=60)
    free.set()
    assert [report.steps for report in reports] == [0]
    assert robot.commands == []


def test_log_states_why_robot_is_held(caplog):
    caplog.set_level("INFO")

    def chunks(number):
        return TimeoutError("no answer in 1 s") if 0 < number < 4 else 100 * number + np.arange(8.0)[:, None]

    _, report = controlled(ScriptedPolicy(chunks, execute_steps=4), mode="async", latencies=(0.0, 0.0, 0.6), steps=33)
    assert (report.failed_requests, report.holds > 10) == (3, True)
    assert [record.message for record in caplog.records] == [
        "no answer in 1 s; sending a new request",
        "No chunk for 1 s: the robot is held until one arrives",
        "The policy answers again, after 3 requests without an answer",
        f"The robot moves again, after {report.holds / HZ:.1f} s",
    ]


def test_log_counts_unanswered_requests_until_next_answer_but_not_before_lost_connection(caplog):
    caplog.set_level("INFO")

    def chunks(number):
        failures = {1: TimeoutError("late"), 3: TimeoutError("late"), 4: TimeoutError("late"), 6: TimeoutError("late")}
        return failures.get(number, ConnectionError("away") if number == 7 else np.zeros((8, 1)))

    _, report = controlled(ScriptedPolicy(chunks, execute_steps=4), mode="async", latencies=(0.0, 0.0, 0.1), steps=60)
    assert report.stopped == "The connection to the policy is lost: away"
    assert [re.sub("[^0-9]", "", record.message) for record in caplog.records if "answers again" in record.message] == [
        "1",
        "2",
    ]


def test_warm_up_retries_busy_server_at_control_rate():
    policy = ScriptedPolicy(lambda number: ServerError("busy", "queue_full") if number < 2 else np.full((8, 1), number))
    robot, _ = controlled(policy, steps=3)
    assert robot.positions[0] == 3
    # At most one request per step. The last request is from the first step of the run.
    assert robot.times[0] == pytest.approx(4 / HZ)


def test_latency_is_quantile_of_last_measurements_rounded_up_to_steps():
    largest, median = LatencyEstimate(window=3), LatencyEstimate(window=3, quantile=0.5)
    assert largest.steps(10) is None
    for seconds in (9.0, 0.11, 0.31, 0.2):
        largest.add(seconds)
        median.add(seconds)
    assert (largest.steps(10), median.steps(10), largest.steps(100)) == (4, 2, 31)
    assert median.steps(1) == 1
    with pytest.raises(ValueError, match="quantile 0"):
        LatencyEstimate(quantile=0)


# ---- late chunks ----


def late_once(**settings):
    """Run the loop with chunk 1 arriving after 0.95 s, when 4 actions are left."""
    policy = ScriptedPolicy(execute_steps=4, action_commands=settings.pop("action_commands", ["position"]))
    return controlled(policy, mode="async", latencies=(0.0, 0.1, 0.95, 0.1), max_age=10, steps=17, **settings)


def test_late_chunk_holds_robot():
    robot, report = late_once()
    assert robot.positions == [*range(8), *[7] * 6, 104, 201]
    assert (report.holds, report.late_chunks, report.stopped) == (6, 1, None)


def test_late_chunk_holds_velocity_robot_at_zero():
    robot, report = late_once(action_commands=["velocity"])
    assert robot.positions[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert report.holds == 6


def test_late_chunk_slows_robot():
    robot, report = late_once(late="slow")
    # The chunk was due one step after the request; from then on an action takes two steps.
    assert robot.positions[:12] == [0, 1, 2, 3, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7]
    assert (report.slowed, report.late_chunks) == (3, 1)
    assert report.holds < 6


def test_slowed_actions_are_limited():
    limits = ActionLimits.of([None], [None], max_step=[0.4])
    robot, report = late_once(late="slow", limits=limits)
    assert report.slowed > 0
    assert np.abs(np.diff(robot.positions)).max() <= 0.4 + 1e-6


def test_late_chunk_stops_run():
    robot, report = late_once(late="stop", action_commands=["velocity"])
    assert "A chunk is late" in report.stopped
    assert robot.positions == [0, 1, 2, 3, 4, 5, 6, 7, 0]  # stands still at the end
    assert "stopped: A chunk is late" in report.summary()


def test_chunk_older_than_its_duration_is_refused():
    policy = ScriptedPolicy(execute_steps=4)
    robot, report = controlled(policy, mode="async", latencies=(0.0, 0.1, 0.85, 0.1), steps=18)
    assert report.stale_chunks == 1
    assert not any(100 <= position < 200 for position in robot.positions)
    assert robot.positions[-4:] == [
        7,
        200,
        201,
        202,
    ]  # the observation was made while the robot was held at the end of chunk 0


def test_three_stale_chunks_in_a_row_end_run():
    _, report = controlled(ScriptedPolicy(), mode="async", latencies=(0.0, 1.0), steps=100)
    assert "3 chunks in a row were stale" in report.stopped
    assert report.actions == 0


def test_unanswered_request_is_followed_by_new_one():
    policy = ScriptedPolicy(lambda number: TimeoutError("no answer") if number == 1 else np.full((8, 1), number))
    robot, report = controlled(policy, mode="async", latencies=(0.0, 0.1), steps=8)
    assert report.failed_requests == 1
    assert 2 in robot.positions


def test_lost_connection_holds_robot_and_ends_run():
    policy = ScriptedPolicy(
        lambda number: ConnectionError("gone") if number == 1 else np.ones((8, 1)), action_commands=["increment"]
    )
    robot, report = controlled(policy, latencies=(0.0, 0.1), steps=20)
    assert report.stopped == "The connection to the policy is lost: gone"
    assert robot.positions[-1] == 0


def test_report_counts_reconnects_during_run():
    def chunks(number):
        policy.reconnects += number == 1
        return np.ones((8, 1))

    policy = ScriptedPolicy(chunks)
    policy.reconnects = 3
    assert controlled(policy)[1].reconnects == 1


@pytest.mark.parametrize("error", [KeyError("camera"), ServerError("camera", "bad_observation")])
def test_other_policy_errors_are_raised_after_holding_robot(error):
    policy = ScriptedPolicy(lambda number: error if number == 1 else np.ones((8, 1)), action_commands=["velocity"])
    clock = VirtualClock()
    robot = ToyRobot(clock)
    loop = ControlLoop(robot, policy, clock=clock, inference=VirtualInference(policy, clock, (0.0,)))
    with pytest.raises(type(error), match="camera"):
        loop.run()
    assert robot.positions[-1] == 0
    assert loop.report.actions == 4


@pytest.mark.parametrize("error", [OSError("the camera is unplugged"), KeyboardInterrupt()])
def test_robot_error_is_raised_after_holding_robot(error):
    policy = ScriptedPolicy(lambda number: np.ones((8, 1)), action_commands=["velocity"])
    clock = VirtualClock()
    robot = ToyRobot(clock)

    def observe():
        if robot.commands:
            raise error
        return {}

    robot.observe = observe
    loop = ControlLoop(robot, policy, clock=clock, inference=VirtualInference(policy, clock, (0.0,)))
    with pytest.raises(type(error)):
        loop.run()
    assert robot.positions == [1, 1, 1, 1, 0, 0]
    assert loop.report.actions == 4


@pytest.mark.parametrize(("mode", "execute_steps"), [("sync", 4), ("async", HORIZON), ("ensemble", HORIZON)])
def test_robot_without_action_is_held_before_an_observation_that_may_block(mode, execute_steps):
    policy = ScriptedPolicy(lambda number: np.ones((HORIZON, 1)), action_commands=["velocity"])
    clock = VirtualClock()
    robot = ToyRobot(clock)
    moving = []

    def observe():
        moving.append(bool(robot.commands) and robot.commands[-1] != 0)
        return {}

    robot.observe = observe
    settings = ControlSettings(mode=mode, execute_steps=execute_steps)
    report = ControlLoop(robot, policy, settings, clock=clock, inference=VirtualInference(policy, clock, (0.05,))).run(
        steps=50
    )
    assert len(moving) > 3
    assert not any(moving)
    assert report.late_chunks == (0 if mode == "sync" else len(moving) - 2)  # without the warm-up and the first chunk


SIGNALED = """
import os, signal
import numpy as np
from torchpi_client import ControlLoop

class Robot:
    commands = []
    def observe(self):
        if self.commands:
            os.kill(os.getpid(), {number})
        return {{}}
    def act(self, action):
        self.commands.append(action.tolist())

class Policy:
    metadata = {{"control_hz": 1000, "action_commands": ["velocity"], "execute_steps": 2}}
    def infer(self, observation):
        return {{"actions": np.full((4, 1), 3, np.float32)}}

signal.signal({number}, signal.SIG_DFL)  # nohup ignores SIGHUP, and children inherit that
try:
    ControlLoop(Robot(), Policy()).run()
finally:
    print(Robot.commands[-1], signal.getsignal({number}) == signal.SIG_DFL)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_ends_the_process_stops_the_robot_first(number):
    script = [sys.executable, "-c", SIGNALED.format(number=int(number))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "[0.0] True\n", "")


def test_own_signal_handler_is_kept_and_other_threads_set_none():
    def handlers():
        policy, clock = ScriptedPolicy(), VirtualClock()
        robot, seen = ToyRobot(clock), set()
        robot.act = lambda action: seen.add(signal.getsignal(signal.SIGTERM))
        ControlLoop(robot, policy, clock=clock, inference=VirtualInference(policy, clock, (0.0,))).run(steps=4)
        return seen

    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        assert handlers() == {own}
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(handlers).result() == {signal.SIG_DFL}
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- NaN and limits ----


def with_bad_action(value):
    def chunks(number):
        chunk = np.stack([100.0 * number + np.arange(HORIZON), np.zeros(HORIZON)], axis=1)
        if number >= 0:
            chunk[2, 1] = value
        return chunk

    return ScriptedPolicy(chunks, execute_steps=4, action_commands=["position", "velocity"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_or_infinity_holds_robot_or_stops_run(value):
    robot, report = controlled(with_bad_action(value), on_invalid="hold", steps=6)
    assert robot.positions == [0, 1, 1, 3, 3, 3]  # the last command has zero velocity
    assert report.invalid.tolist() == [0, 1]
    assert "NaN or infinity: b 1" in report.summary()
    robot, report = controlled(with_bad_action(value), steps=6)
    assert report.stopped == "NaN or infinity in the action, dimensions [1]"
    assert robot.positions == [0, 1, 1]
    assert np.isfinite(robot.commands).all()


@pytest.mark.parametrize("mode", ["sync", "async", "rtc", "ensemble"])
def test_nan_never_reaches_robot_in_any_mode(mode):
    policy = ScriptedPolicy(lambda number: np.full((HORIZON, 1), np.nan), execute_steps=4, **{RTC: True})
    robot, report = controlled(policy, mode=mode, on_invalid="hold", steps=12)
    assert robot.commands == []
    assert report.invalid[0] > 3
    assert report.actions == 0


def test_commands_are_clipped_to_range_and_largest_step():
    chunk = np.array([[0.0, 5.0], [9.0, 5.0], [9.0, -5.0], [0.3, 0.0]])
    policy = ScriptedPolicy(lambda number: chunk, execute_steps=4, action_commands=["position", "velocity"])
    limits = ActionLimits.of([-1, None], [1, 2], max_step=[0.5, None])
    robot, report = controlled(policy, limits=limits, start=np.array([0.2, 0.0]), steps=5)
    np.testing.assert_allclose(robot.commands[1:5], [[0.0, 2], [0.5, 2], [1.0, -5], [0.5, 0]], atol=1e-6)
    assert report.range_clipped.tolist() == [2, 2]
    assert report.step_clipped.tolist() == [2, 0]
    assert "outside the range: a 2, b 2\ntoo large a step: a 2" in report.summary()


def test_first_command_is_step_limited_from_start():
    policy = ScriptedPolicy(lambda number: np.full((4, 1), 1.0))
    limits = ActionLimits.of([-1], [1], max_step=[0.25])
    robot, _ = controlled(policy, limits=limits, start=np.zeros(1), steps=3)
    assert robot.positions[0] == 0  # held there during the first inference
    assert robot.positions[1] == 0.25


def test_limits_from_metadata():
    own = {"low": [-1, None, 0], "high": [1, None, None], "max_step": [0.1, 2, None]}
    trained = {"low": [0, -2, 3], "high": [10, 2, 4]}
    limits = ActionLimits.from_metadata({"action_limits": own})
    assert (limits.low.tolist(), limits.high.tolist()) == ([-1, -math.inf, 0], [1, math.inf, math.inf])
    assert limits.max_step.tolist() == [0.1, 2, math.inf]
    # Without a range in the embodiment, the training range applies.
    limits = ActionLimits.from_metadata({"action_limits": own, "action_range": trained})
    assert (limits.low.tolist(), limits.high.tolist()) == ([-1, -2.4, 0], [1, 2.4, math.inf])
    assert limits.max_step.tolist() == [0.1, 2, math.inf]
    trained = {"low": [0, -2], "high": [10, 2]}
    limits = ActionLimits.from_metadata({"action_limits": None, "action_range": trained}, margin=0.1)
    np.testing.assert_allclose([limits.low, limits.high], [[-1, -2.4], [11, 2.4]])
    with pytest.raises(ValueError, match=r"neither action_limits nor action_range, only embodiment"):
        ActionLimits.from_metadata({"embodiment": "aloha"})
    for malformed in ({"low": [0]}, [0, 1]):
        with pytest.raises(
            ValueError, match=r"The server's action_range is .*; expected a dict with the lists low and"
        ):
            ActionLimits.from_metadata({"action_range": malformed})
    with pytest.raises(ValueError, match="action_limits are for 3 dimensions, its action_range for 2"):
        ActionLimits.from_metadata({"action_limits": {**own, "max_step": None}, "action_range": trained})


def test_limits_in_embodiment_file_limit_commands(tmp_path):
    """From the embodiment file through policy folder, server and client to the command."""
    demo = load_policy("demo", device="cpu")
    robot = demo.embodiment.to_dict()
    robot["actions"][0] |= {"low": -0.001, "high": 0.001}
    robot["actions"][3] |= {"low": None, "high": 1, "max_step": 0.01}
    (tmp_path / "robot.json").write_text(json.dumps(robot))
    demo.embodiment = get_embodiment(tmp_path / "robot.json")
    demo.save(tmp_path / "policy")
    file = tmp_path / "policy" / "policy.json"
    content = json.loads(file.read_text())
    content["embodiment"]["actions"][3]["low"] = None  # as in a hand-written file
    file.write_text(json.dumps(content))
    policy = load_policy(tmp_path / "policy", device="cpu")
    toy = ToyRobot(VirtualClock(), dims=4)
    toy.observe = demo.example_observation
    settings = ServeSettings(port=0, num_steps=1, max_batch=1)
    with running_server({"p": lambda: policy}, settings) as (url, _), WebsocketPolicy(url) as remote:
        limits = ActionLimits.from_metadata(remote.metadata)
        how = ControlSettings(limits=limits, start=np.zeros(4, np.float32))
        inference = VirtualInference(remote, toy.clock, (0.0,))
        report = ControlLoop(toy, remote, how, clock=toy.clock, inference=inference).run(steps=4)
        answer = remote.infer(toy.observe())
    commands = np.array(toy.commands)
    assert 0.0009 < np.abs(commands[:, 0]).max() <= 0.001
    assert answer["actions_clipped"] > 0  # the policy clips to the range, so the loop need not
    assert np.abs(np.diff(commands[:, 3])).max() <= 0.0101
    assert report.step_clipped[3] > 0
    # Other dimensions have the training range.
    trained = policy.metadata["action_range"]
    np.testing.assert_allclose(limits.low[1], trained["low"][1] - 0.1 * (trained["high"][1] - trained["low"][1]))


def test_hold_ignores_range_and_end_of_run_ignores_step_limit():
    """Velocities from 0.5 to 1: a held robot slows to 0 step by step, but stops immediately at the end of the run."""
    policy = ScriptedPolicy(lambda number: np.full((4, 1), 1.0), execute_steps=4, action_commands=["velocity"])
    limits = ActionLimits.of([0.5], [1], max_step=[0.25])
    robot, _ = controlled(policy, limits=limits, latencies=(0.0, 0.0, 0.45), steps=9)
    assert robot.positions == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    robot, _ = controlled(policy, limits=limits, steps=3)
    assert robot.positions == [1, 1, 0]


def test_limits_are_scaled_to_control_rate():
    """At twice the rate the largest step is half as long: the speed is the same."""
    policy = ScriptedPolicy(
        lambda number: np.array([[0.0, 0.4]] + [[9.0, 0.4]] * 7),
        execute_steps=8,
        action_commands=["position", "increment"],
    )
    limits = ActionLimits.of([None, -0.1], [None, 0.1], max_step=[1, None])
    for control_hz, step, increment in ((10.0, 1, 0.1), (20.0, 0.5, 0.05), (5.0, 2, 0.2)):
        robot, _ = controlled(policy, control_hz=control_hz, resample="interpolate", limits=limits, steps=4)
        np.testing.assert_allclose(robot.commands[:3], [[step * i, increment] for i in range(3)], atol=1e-6)
    robot, _ = controlled(policy, control_hz=20.0, resample="as_is", limits=limits, steps=3)
    np.testing.assert_allclose(robot.commands[:2], [[0, 0.1], [1, 0.1]], atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "max_step", "message"),
    [
        ([0, 2], [1, 1], None, r"dimensions \[1\]: low is above high"),
        ([math.nan], [1], None, "NaN"),
        ([0], [1], [0], "step is not positive"),
        ([0], [1, 2], None, "shapes"),
        ([0], [1], 0.05, r"max_step is 0.05; expected a list with one number per action dimension"),
        (-1, [1], None, "low is -1; expected a list"),
        ([0], ["a"], None, r"high is \['a'\]; expected a list"),
    ],
)
def test_invalid_limits_are_refused(low, high, max_step, message):
    with pytest.raises(ValueError, match=message):
        ActionLimits.of(low, high, max_step=max_step)


# ---- the rate ----


def test_steps_have_no_drift():
    robot, report = controlled(
        ScriptedPolicy(lambda number: np.zeros((500, 1)), execute_steps=500),
        mode="async",
        busy=dict.fromkeys(range(300), 0.0999),
        steps=301,
    )
    steps = np.subtract(robot.times, robot.times[0]) * HZ
    np.testing.assert_allclose(steps, np.arange(300), atol=1e-6)
    assert (report.overruns.count, report.missed_steps) == (0, 0)


def test_overruns_are_counted_without_catching_up_in_burst():
    busy = {2: 0.104, 5: 0.17, 8: 0.45}
    robot, report = controlled(
        ScriptedPolicy(lambda number: np.arange(50.0)[:, None], execute_steps=50), mode="async", busy=busy, steps=20
    )
    begun = np.subtract(robot.times, [busy.get(i, 0) for i in range(len(robot.times))])
    gaps = np.diff(begun) * HZ
    # 1.04 periods: the next step follows immediately. 1.7: one step is skipped. 4.5: three are skipped.
    np.testing.assert_allclose(gaps[:10], [1, 1, 1.04, 0.96, 1, 2, 1, 1, 4.5, 0.5], atol=1e-6)
    assert gaps.min() >= 0.5 - 1e-6
    assert robot.positions == list(range(len(robot.positions)))  # no action is skipped
    assert report.overruns.count == 3
    assert report.overruns.largest == pytest.approx(0.35)
    assert report.missed_steps == 1 + 3
    assert report.steps + report.missed_steps == 20


@pytest.mark.parametrize("mode", ["async", "ensemble"])
def test_rest_of_chunk_is_stale_after_long_overrun(mode):
    """The robot's command takes 2 s, and the chunk lasts 0.8 s."""
    settings = {"mode": mode, "latencies": (0.0, 0.05), "steps": 30}
    robot, report = controlled(ScriptedPolicy(execute_steps=7), busy={3: 2.0}, **settings)
    before, after = robot.positions[:4], robot.positions[4:]
    if mode == "async":
        assert before == [0, 1, 2, 3]
        assert after[:3] == [3, 100, 101]  # held until a chunk for the current observation arrives
    assert not set(after[1:]) & {4, 5, 6, 7}
    assert report.stale_chunks == (1 if mode == "async" else 2)  # async: also the chunk being inferred
    robot, report = controlled(ScriptedPolicy(execute_steps=7), busy={3: 2.0}, max_age=3, **settings)
    assert report.stale_chunks == 0
    if mode == "async":
        assert robot.positions[:7] == [0, 1, 2, 3, 4, 5, 6]


def test_rest_of_chunk_is_stale_after_many_short_overruns():
    """Each command takes 0.3 s, so each step skips two; no second chunk arrives."""
    policy = ScriptedPolicy(lambda number: TimeoutError("away") if number > 0 else np.arange(8.0)[:, None])
    busy = dict.fromkeys(range(100), 0.3)
    robot, report = controlled(policy, mode="async", busy=busy, latencies=(0.0, 0.05), max_age=0.45, steps=60)
    # Action 3 would begin 0.6 s after its chunk arrived.
    assert set(robot.positions) == {0, 1, 2}
    assert report.stale_chunks == 1


def test_other_rate_without_resample_is_refused():
    with pytest.raises(ValueError, match=r"control_hz is 20, but the policy's actions are for 10 Hz.*how to resample"):
        controlled(ScriptedPolicy(), control_hz=20.0)
    with pytest.raises(ValueError, match="pass control_hz="):
        controlled(ScriptedPolicy(control_hz=None))
    with pytest.raises(ValueError, match=r"8 actions at 10 Hz is shorter than one step at 1 Hz.*at least 1.25"):
        controlled(ScriptedPolicy(), control_hz=1.0, resample="interpolate")
    robot, _ = controlled(ScriptedPolicy(control_hz=None), control_hz=5.0, steps=4)
    np.testing.assert_allclose(np.diff(robot.times), 0.2)


def test_resample_keeps_motion_or_actions():
    robot, _ = controlled(ScriptedPolicy(execute_steps=3), control_hz=20.0, resample="interpolate", steps=7)
    assert robot.positions == [0, 0.5, 1, 1.5, 2, 2.5]
    np.testing.assert_allclose(np.diff(robot.times), 0.05)
    robot, _ = controlled(ScriptedPolicy(execute_steps=3), control_hz=20.0, resample="as_is", steps=4)
    assert robot.positions == [0, 1, 2]


def test_rtc_at_other_rate_sends_rest_at_policy_rate():
    policy = rtc_policy()
    robot, _ = controlled(
        policy, mode="rtc", latencies=(9.0, 9.0, 0.25), steps=24, control_hz=20.0, resample="interpolate"
    )
    warm_up, first, second, third = (request.get(RTC) for request in policy.requests[1:5])
    assert (len(warm_up["action_prefix"]), first) == (HORIZON - 1, None)
    assert second["action_prefix"].tolist() == [[4], [5], [6], [7]]
    assert (second["delay"], second["execution_horizon"]) == (3, 4)  # 0.25 s, and four steps of 0.1 s
    # Chunk 1 arrived after five commands, during its action 2; the next request is at its action 4.
    assert robot.positions[7:16] == [3.5, 4, 4.5, 5, 5.5, 6, 102.5, 103, 103.5]
    assert third["action_prefix"].tolist() == [[104], [105], [106], [107]]
    # Slower than the policy: the rest is what will be executed, resampled to the policy's shorter steps.
    policy = rtc_policy(execute_steps=4)
    controlled(policy, mode="rtc", latencies=(0.0, 0.0, 0.05), steps=5, control_hz=5.0, resample="interpolate")
    second = policy.requests[3][RTC]
    assert second["action_prefix"].tolist() == [[4], [5], [6], [6]]
    assert (second["delay"], second["execution_horizon"]) == (1, 4)


@pytest.mark.parametrize("control_hz", [20.0, 25.0, 5.0, 4.0, 10.0])
def test_resampling_keeps_sum_of_increments_and_average_velocity(control_hz):
    chunk = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    chunk[:, 0] = np.linspace(0, 1.9, 20)
    out = resample(chunk, ("position", "increment", "velocity", "effort"), from_hz=10.0, to_hz=control_hz)
    assert (out.shape, out.dtype) == ((int(2 * control_hz), 4), np.float32)
    np.testing.assert_allclose(np.diff(out[: -math.ceil(control_hz / 10), 0]), 1 / control_hz, atol=1e-6)
    np.testing.assert_allclose(out[:, 1].sum(), chunk[:, 1].sum(), atol=1e-5)
    np.testing.assert_allclose(out[:, 2].mean(), chunk[:, 2].mean(), atol=1e-6)
    assert set(out[:, 3]) <= set(chunk[:, 3])
    if control_hz == 10:
        np.testing.assert_allclose(out, chunk, atol=1e-6)


def test_stretched_action_has_same_end_result():
    parts = stretch(
        np.array([1.0, 9, 9, 9]), np.array([2.0, 4, 4, 4]), ("position", "velocity", "increment", "effort"), 2
    )
    np.testing.assert_allclose(parts, [[1.5, 2, 2, 4], [2, 2, 2, 4]])


# ---- settings and the rest ----


@pytest.mark.parametrize(
    ("commands", "names", "missing"),
    [
        (None, ["elbow"], "elbow"),
        (None, None, "all of them"),
        (["position", None], ["elbow", "gripper"], "gripper"),
        (["joint"], None, "0"),
    ],
)
def test_missing_action_commands_are_refused_with_remedy(commands, names, missing):
    policy = ScriptedPolicy()
    policy.metadata.update(action_commands=commands, action_names=names)
    remedy = 'one of position, velocity, .*action_commands= in ControlSettings.*"command".*a velocity robot keeps'
    message = rf"have no valid command: {missing}\. .*{remedy}"
    with pytest.raises(ValueError, match=message):
        controlled(policy)


def test_action_commands_from_settings():
    policy = ScriptedPolicy()
    policy.metadata["action_commands"] = None
    robot, _ = controlled(policy, action_commands=("position",))
    assert robot.commands


@pytest.mark.parametrize("commands", [["position"], ["position"] * 3])
def test_wrong_count_of_action_commands_in_settings_is_refused(commands):
    message = (
        rf"action_commands in ControlSettings has {len(commands)} commands; the policy's actions have 2 dimensions"
    )
    policy = ScriptedPolicy(lambda number: np.zeros((8, 2)))
    policy.metadata.update(action_names=["elbow", "gripper"], action_commands=None)
    with pytest.raises(ValueError, match=f"{message}: elbow, gripper. Give one command for each"):
        controlled(policy, action_commands=commands)
    policy.metadata.update(action_names=None)  # known from the first chunk only
    with pytest.raises(ValueError, match=rf"{message}\. Give one"):
        controlled(policy, action_commands=commands)


def test_action_kinds_of_older_server_are_read():
    policy = ScriptedPolicy()
    policy.metadata.update(action_commands=None, action_kinds=["velocity"])
    robot, _ = controlled(policy)
    assert robot.commands[-1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast'; expected one of sync, async, rtc, ensemble"),
        ({"late": "go"}, "late is 'go'"),
        ({"on_invalid": "pass"}, "on_invalid is 'pass'"),
        ({"resample": "linear"}, "resample is 'linear'"),
        ({"control_hz": 0.0}, "control_hz is 0.0"),
        ({"execute_steps": 9}, "execute_steps is 9, but the policy's chunk has only 8"),
        ({"limits": ActionLimits.of([0, 0], [1, 1])}, "limits has 2 dimensions; the actions have 1"),
        ({"start": np.zeros(3)}, "start has 3 dimensions"),
        ({"start": 5.0}, "start is 5.0; expected a list with one number per action dimension"),
        ({"start": ["a"]}, r"start is \['a'\]; expected a list"),
        ({"ensemble_decay": "1"}, "ensemble_decay is '1'; expected a finite number"),
        ({"start": np.array([np.nan])}, "start is .*with NaN or infinity"),
        ({"limits": {"low": [0]}}, r"limits is \{'low': .*; expected ActionLimits\.of"),
        ({"execute_steps": 2.5}, "execute_steps is 2.5; expected a positive whole number"),
        ({"control_hz": "50"}, "control_hz is '50'; expected a positive number"),
        ({"ensemble_decay": math.nan}, "ensemble_decay is nan; expected a finite number"),
        ({"action_commands": "position"}, "action_commands is 'position'; expected a list, one command per action"),
        ({"action_commands": []}, r"action_commands is \[\]; expected a list, one command per action dimension"),
        (
            {"action_commands": ["position", "torque", None]},
            r"has 'torque' \(dimension 1\), None \(dimension 2\); each must be one of position, velocity, increment",
        ),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        controlled(ScriptedPolicy(), **settings)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"control_hz": 0}, "The server's control_hz is 0; expected a positive number"),
        ({"control_hz": "50"}, "The server's control_hz is '50'"),
        ({"execute_steps": 2.5}, "The server's execute_steps is 2.5; expected a positive whole number"),
    ],
)
def test_invalid_server_metadata_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        controlled(ScriptedPolicy(**metadata))


def test_recommendation_beyond_the_chunk_is_refused_unless_the_settings_overrule_it():
    policy = ScriptedPolicy(execute_steps=9)
    policy.url = "ws://robot:8000"
    with pytest.raises(
        ValueError, match=r"The policy at ws://robot:8000 recommends execute_steps 9, but .* only 8 actions"
    ):
        controlled(policy)
    assert controlled(ScriptedPolicy(execute_steps=9), execute_steps=8, steps=3)[1].actions == 2


def test_rtc_refuses_execute_steps_of_whole_chunk():
    with pytest.raises(ValueError, match=r'8 of 8 steps at 10 Hz are executed.*mode "rtc" needs at least one left'):
        controlled(rtc_policy(), mode="rtc", execute_steps=HORIZON)
    policy = rtc_policy()
    for control_hz, steps in ((5.0, 4), (1.25, 1)):  # 7 of 8 actions, rounded
        with pytest.raises(ValueError, match=f"{steps} of {steps} steps at {control_hz:g} Hz are executed"):
            controlled(policy, mode="rtc", execute_steps=7, control_hz=control_hz, resample="interpolate")
    assert not any(RTC in request for request in policy.requests)


@pytest.mark.parametrize(
    "answer",
    [[1.0], {"chunk": 1}, {"actions": np.zeros((8, 2), np.float32)}, {"actions": np.zeros(8)}, {"actions": [[1]]}],
)
def test_malformed_chunks_are_refused_before_robot_moves(answer):
    policy = ScriptedPolicy()
    policy.infer = lambda observation: answer
    clock = VirtualClock()
    robot = ToyRobot(clock)
    with pytest.raises(ValueError, match="expected"):
        ControlLoop(robot, policy, clock=clock, inference=VirtualInference(policy, clock, (0.0,))).run(steps=3)
    assert robot.commands == []


def test_dry_run_shows_chunks_and_sends_nothing():
    seen = []
    robot, report = controlled(ScriptedPolicy(), dry_run=True, on_chunk=seen.append, steps=12)
    assert robot.commands == []
    assert robot.observed == len(seen) > 2
    assert report.actions > 4
    assert "dry run: nothing was sent" in report.summary()
    table = format_chunk(np.array([[0.5, np.nan], [2, 1]]), ["arm", "hand"], ActionLimits.of([0, 0], [1, 1]))
    assert [line.split() for line in table.splitlines()] == [
        ["step", "arm", "hand"],
        ["0", "0.5000", "nan!"],
        ["1", "2.0000!", "1.0000"],
    ]


def test_wrong_arguments_are_refused_before_robot_moves():
    policy, clock = ScriptedPolicy(), VirtualClock()
    robot = ToyRobot(clock)
    for arguments, message in (
        ((object(), policy), "The robot is <object .*, without observe and act"),
        ((robot, "ws://robot:8000"), "The policy is 'ws://robot:8000', without metadata and infer"),
        ((robot, policy, {"mode": "rtc"}), "settings is of type dict; expected ControlSettings"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlLoop(*arguments)
    loop = ControlLoop(robot, policy, clock=clock, inference=VirtualInference(policy, clock, (0.0,)))
    for name, value in (("seconds", "5"), ("seconds", -1), ("steps", math.nan)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a number of 0 or more"):
            loop.run(**{name: value})
    robot.observe = lambda: [1, 2]
    with pytest.raises(ValueError, match=r"observe\(\) returned a value of type list; expected a dict"):
        loop.run(steps=1)
    assert robot.commands == []


def test_stop_ends_run_and_loop_runs_once():
    policy = ScriptedPolicy()
    clock = VirtualClock()
    robot = ToyRobot(clock)
    loop = ControlLoop(
        robot,
        policy,
        clock=clock,
        inference=VirtualInference(policy, clock, (0.0,)),
        on_chunk=lambda chunk: loop.stop() if chunk[0, 0] == 100 else None,
    )
    report = loop.run(seconds=1e6)
    assert report.stopped is None
    assert report.chunks == 2
    with pytest.raises(ValueError, match="has run already"):
        loop.run()


def test_seconds_are_converted_to_steps():
    assert controlled(ScriptedPolicy(), seconds=1.2)[1].steps == 12


def test_monotonic_clock_and_background_inference():
    """Use the real clock and thread, which the other tests replace."""
    clock = MonotonicClock()
    policy = ScriptedPolicy(control_hz=1000.0, execute_steps=4)
    robot = ToyRobot(VirtualClock())
    loop = ControlLoop(
        robot,
        policy,
        ControlSettings(mode="async", max_age=60.0),
        on_chunk=lambda chunk: loop.stop() if chunk[0, 0] == 100 else None,
    )
    before = clock.now()
    report = loop.run(seconds=60)
    assert robot.positions[:4] == [0, 1, 2, 3]
    assert clock.now() - before >= (report.steps + report.missed_steps - 1) / 1000
    inference = BackgroundInference(policy, clock)
    assert inference.poll() is None
    policy.infer = lambda observation: {}["missing"]
    inference.start({})
    assert inference.busy
    assert isinstance(inference.wait(60.0).error, KeyError)
    assert not inference.busy


def test_pacer_sleeps_until_next_period():
    clock = VirtualClock()
    pacer = Pacer(clock, 0.1)
    clock.time = 0.03
    assert pacer.wait() == (0, 0)
    assert clock.time == pytest.approx(0.1)


# ---- uncertainty ----


class UncertainPolicy(ScriptedPolicy):
    """Policy with these uncertainties in turn, first for the warm-up; None: no uncertainty. The last repeats."""

    def __init__(self, uncertainties, **arguments):
        super().__init__(**arguments)
        self.uncertainties = list(uncertainties)

    def infer(self, observation):
        value = self.uncertainties.pop(0) if len(self.uncertainties) > 1 else self.uncertainties[0]
        return super().infer(observation) | ({} if value is None else {"uncertainty": value})


@pytest.mark.parametrize("command", ["position", "increment"])
@pytest.mark.parametrize("mode", ["sync", "async", "rtc", "ensemble"])
def test_robot_is_held_while_the_policy_is_uncertain(mode, command, caplog):
    warm_ups = 2 if mode == "rtc" else 1
    uncertainties = [0.9] * warm_ups + [0.1] * 2 + [0.5] * 3 + [0.2]
    policy = UncertainPolicy(uncertainties, action_commands=[command], **{RTC: mode == "rtc"})
    settings = {"mode": mode, "execute_steps": 4, "max_uncertainty": 0.2, "late": "stop"}
    with caplog.at_level("INFO"):
        robot, report = controlled(policy, latencies=(0.0,), steps=24, **settings)
    assert report.stopped is None  # the robot is not held for a late chunk
    assert report.uncertain_chunks == 3
    assert report.holds >= 2
    before = [0.0, *robot.positions] if command == "position" else [0.0] * len(robot.positions)
    still = [now for now, last in zip(robot.positions[1:], before[1:], strict=False) if now == last]
    assert len(still) >= report.holds
    assert report.actions + report.holds + report.waits == report.steps
    text = [record.getMessage() for record in caplog.records if "certain" in record.getMessage()]
    assert text == [
        "The policy is uncertain: 0.5 is above max_uncertainty, 0.2; the robot is held until a chunk is below it",
        "The policy is certain again: 0.2 is not above max_uncertainty",
    ]
    assert "3 chunks refused as uncertain" in report.summary()


def test_uncertain_chunk_drops_rest_of_previous_chunk():
    # Chunk 0 is requested immediately, chunk 1 after two actions of chunk 0; from then on the robot is held.
    policy = UncertainPolicy([0.0, 0.0, 0.7])
    robot, report = controlled(policy, mode="async", execute_steps=2, max_uncertainty=0.5, steps=8)
    assert robot.positions[-4:] == [robot.positions[-5]] * 4
    assert max(robot.positions) < 100
    assert report.uncertainty.largest == 0.7


def test_uncertainty_without_limit_is_only_counted():
    _, report = controlled(UncertainPolicy([0.1, 0.4]), steps=8)
    assert (report.uncertain_chunks, report.holds) == (0, 0)
    assert report.uncertainty.mean == pytest.approx(0.4)
    for nothing in (None, "low", np.zeros(3), True):  # from a server with another meaning of the field
        _, report = controlled(UncertainPolicy([nothing]), steps=8)
        assert report.uncertainty.count == 0


@pytest.mark.parametrize("answered", [None, math.nan, "low", np.zeros(3)])
def test_max_uncertainty_needs_server_with_several_samples(answered):
    policy = UncertainPolicy([answered])
    with pytest.raises(ValueError, match=r"The policy answered .*start the server with --num-samples 2 or more"):
        controlled(policy, max_uncertainty=0.5)
    assert len(policy.requests) == 1  # before the robot moves


@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, "0.5", True])
def test_max_uncertainty_must_be_positive(wrong):
    with pytest.raises(ValueError, match="max_uncertainty is"):
        ControlSettings(max_uncertainty=wrong)
