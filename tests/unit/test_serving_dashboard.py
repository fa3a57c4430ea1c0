"""Numbers, images and access control of the dashboard, as a browser requests them."""

import dataclasses
import io
import json
import re
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image
from serving_helpers import SECONDS, FakePolicy, H, clients, http, observation, served

from torchpi.robots import Camera, Embodiment, StateKey
from torchpi.serving import dashboard as module
from torchpi.serving.dashboard import FORGET_AFTER, MAX_LEFT, Dashboard, Timeline, dashboard_page
from torchpi.serving.run import policy_paths
from torchpi.serving.scheduler import Answer
from torchpi.types import PreviousChunk

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\"'&"


def read(url, path, **headers):
    """Status, headers and body of a response."""
    request = urllib.request.Request(url.replace("ws://", "http://") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def summary(url, **headers):
    status, response_headers, body = read(url, "/dashboard.json", **headers)
    assert (status, response_headers["Content-Type"], response_headers["Cache-Control"]) == (
        200,
        "application/json",
        "no-store",
    )
    return json.loads(body)


def answer(seconds=0.1, chunk=None):
    actions = np.zeros((H, 2), np.float32) if chunk is None else chunk
    return Answer({"actions": actions, "policy_timing": {}}, seconds, 2 * seconds, 1)


def asked_and_answered(dashboard, robot, at, until, previous=None):
    dashboard.requested(robot, previous, at)
    dashboard.answered(robot, observation(), answer(), until)


# ---- over HTTP ----


def test_summary_has_images_state_and_chunk_of_each_robot():
    with served(FakePolicy(), FakePolicy()) as (url, _), clients(url) as [first], clients(url + "/p1") as [second]:
        image = np.full((6, 8, 3), 200, np.uint8)
        chunk = first.ask({**observation(5.0), "camera": image, "prompt": HOSTILE})["actions"]
        second.ask(observation(6.0))
        content = summary(url)
        assert (content["ready"], content["connections"], content["waiting"]) == (True, 2, 0)
        assert [(policy["name"], policy["embodiment"], policy["robots"]) for policy in content["policies"]] == [
            ("p0", "fake", 1),
            ("p1", "fake", 1),
        ]
        one, other = content["robots"]
        assert (one["policy"], other["policy"]) == ("p0", "p1")
        assert (one["requests"], one["error"], one["left"]) == (1, None, False)
        assert one["answered"]["prompt"] == HOSTILE
        assert other["answered"]["prompt"] == "go"  # the policy's default
        assert one["answered"]["state"] == [{"name": "x", "value": 5.0}, {"name": "y", "value": 2.0}]
        assert one["answered"]["cameras"] == [{"name": "base_0_rgb", "key": "camera", "sent": True}]
        assert one["answered"]["executed"]["source"] == "estimated"
        [second_of_requests] = one["timeline"]
        assert second_of_requests["requests"] == 1
        dimensions = json.loads(read(url, f"/chunk/{one['number']}.json")[2])["dimensions"]
        assert [dimension["name"] for dimension in dimensions] == ["x", "y"]
        np.testing.assert_allclose([dimension["values"] for dimension in dimensions], chunk.T, rtol=1e-3)
        status, headers, body = read(url, f"/frame/{one['number']}/base_0_rgb.jpg")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(body))), image, atol=3)


def test_partly_flat_and_partly_nested_keys_are_shown():
    policy = FakePolicy()
    policy.embodiment = dataclasses.replace(
        policy.embodiment,
        cameras=(Camera("base_0_rgb", "images.front.rgb"),),
        state=(StateKey("robot.arm.state", ("x", "y")),),
    )
    image = np.full((6, 8, 3), 200, np.uint8)
    sent = {"images": {"front.rgb": image}, "robot.arm": {"state": np.array([5.0, 2.0])}}
    policy.example_observation = lambda: sent
    with served(policy) as (url, _), clients(url) as [client]:
        assert "actions" in client.ask(sent)
        [robot] = summary(url)["robots"]
        assert robot["answered"]["state"] == [{"name": "x", "value": 5.0}, {"name": "y", "value": 2.0}]
        assert robot["answered"]["cameras"] == [{"name": "base_0_rgb", "key": "images.front.rgb", "sent": True}]
        assert read(url, f"/frame/{robot['number']}/base_0_rgb.jpg")[0] == 200


def test_missing_paths_are_not_found():
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        paths = ["/chunk/0.json", "/frame/0/base_0_rgb.jpg", "/chunk/x.json", "/frame/0/..%2f.jpg", "/dashboard.jsonx"]
        assert [read(url, path)[0] for path in paths] == [404] * 5  # the robot has sent no request yet
        client.ask(observation())
        assert [read(url, path)[0] for path in paths] == [200, 200, 404, 404, 404]


def test_errors_are_shown_until_the_next_answer():
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        client.ask({**observation(), "state": np.zeros(7)})
        [robot] = summary(url)["robots"]
        assert robot["error"].startswith("bad_observation: ")
        assert robot["answered"] is None
        client.ask(observation())
        assert summary(url)["robots"][0]["error"] is None


def test_executed_steps_are_reported_by_the_robot():
    policy = FakePolicy()
    with served(policy) as (url, _), clients(url) as [client]:
        client.ask(observation())
        policy.hold()
        rest = np.ones((1, 2), np.float32)
        client.send({**observation(), "torchpi/rtc": {"action_prefix": rest, "delay": 1, "execution_horizon": 3}})
        policy.wait_until_begun()
        [robot] = summary(url)["robots"]
        assert robot["answered"]["executed"] == {"steps": 3, "source": "reported"}
        assert robot["waits_seconds"] >= 0
        policy.release()
        client.receive()


def test_page_runs_only_its_own_script():
    with served(FakePolicy()) as (url, _), clients(url) as [client]:
        client.ask({**observation(), "prompt": HOSTILE})
        status, headers, body = read(url, "/")
    page = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page == dashboard_page()[0]  # it contains no data of clients
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert page.count("<script") == page.count("</script") == page.count("<style") == 1
    assert not re.search(r'(src|href)="(?!data:,)|url\(|@import|innerHTML|insertAdjacent|document\.write', page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_token_protects_the_dashboard():
    with served(FakePolicy(), token="a+b/c d") as (url, _):
        key = {"Authorization": "Bearer a+b/c d"}
        for path in ("/", "/dashboard.json", "/chunk/0.json", "/frame/0/x.jpg", "/?token=wrong", "/?token"):
            assert read(url, path)[0] == 401
        assert "/?token=TOKEN" in http(url, "/")[1]
        assert summary(url, **key)["robots"] == []
        assert summary(url, Authorization="Api-Key a+b/c d")["ready"] in (True, False)
        assert [read(url, f"/?token={text}")[0] for text in ("a+b/c%20d", "a%2Bb%2Fc%20d")] == [200, 200]
        assert read(url, "/dashboard.json?token=a+b/c%20d")[0] == 401  # only the page accepts a token in the URL
        assert read(url, "/", **key)[0] == 200


def test_local_server_without_token_refuses_other_host_names():
    with served(FakePolicy()) as (url, _):
        port = urllib.parse.urlsplit(url).port
        hosts = [f"localhost:{port}", "127.0.0.1", "[::1]:1", "evil.example", f"127.0.0.1.evil.example:{port}", ""]
        assert [read(url, "/dashboard.json", Host=host)[0] for host in hosts] == [200, 200, 200, 403, 403, 403]
    with served(FakePolicy(), token="t") as (url, _):
        assert read(url, "/dashboard.json", Host="robot.example", Authorization="Bearer t")[0] == 200


def test_policy_named_like_a_page_is_refused():
    with pytest.raises(ValueError, match="taken"):
        policy_paths(None, ["dashboard.json=demo"])


# ---- what is kept ----


@pytest.fixture
def dashboard():
    return Dashboard()


@pytest.fixture
def robot(dashboard):
    return dashboard.join(0, "p0", FakePolicy(), "127.0.0.1:1")


def test_executed_steps_are_estimated_from_the_time(dashboard, robot):
    assert robot.executed(0.0) is None
    asked_and_answered(dashboard, robot, at=10.0, until=10.5)
    # 10 Hz, 4 actions, starting at the answer
    assert [robot.executed(10.5 + after)["steps"] for after in (0.0, 0.15, 0.25, 99.0)] == [0, 1, 2, H]
    dashboard.requested(robot, None, 10.75)
    assert robot.executed(99.0) == {"steps": 2, "source": "estimated"}  # the robot may be waiting for its answer
    dashboard.leave(robot, 10.7)
    assert robot.executed(99.0)["steps"] == 1


def test_steps_of_a_chunk_conditioned_on_the_previous_one_begin_at_its_request(dashboard, robot):
    previous = PreviousChunk(np.ones((2, 2), np.float32), 1, 2)
    asked_and_answered(dashboard, robot, at=10.0, until=10.15, previous=previous)
    assert robot.executed(10.15) == {"steps": 1, "source": "estimated"}


def test_executed_steps_are_unknown_without_a_control_rate(dashboard):
    policy = FakePolicy()
    policy.embodiment = Embodiment.generic("still", cameras={"base_0_rgb": "camera"}, state=["x"], actions=["x", "y"])
    robot = dashboard.join(0, "p0", policy, "")
    asked_and_answered(dashboard, robot, at=1.0, until=2.0)
    assert robot.executed(3.0) is None


def test_only_the_last_observation_is_kept_and_not_copied(dashboard, robot):
    for number in range(3):
        sent = observation(float(number))
        dashboard.requested(robot, None, 1.0)
        dashboard.answered(robot, sent, answer(), 2.0)
    assert dashboard.image(0, "base_0_rgb") is sent["camera"]
    assert robot.last.observation is sent


def test_numbers_that_are_not_finite_are_null(dashboard, robot):
    dashboard.requested(robot, None, 1.0)
    chunk = np.array([[np.nan, np.inf], [0.123456, 1e-9]], np.float32)
    dashboard.answered(robot, observation(), answer(chunk=chunk), 2.0)
    x, y = dashboard.chunk(0)["dimensions"]
    assert (x["values"], y["values"]) == ([None, 0.1235], [None, 1e-9])


def test_chunk_has_the_training_range_of_each_dimension(dashboard):
    policy = FakePolicy(action_range={"low": [-1.0, 0.0], "high": [1.0, 0.5]})
    robot = dashboard.join(7, "p0", policy, "")
    asked_and_answered(dashboard, robot, at=1.0, until=2.0)
    assert [each["span"] for each in dashboard.chunk(7)["dimensions"]] == [2.0, 0.5]


def test_robots_are_forgotten_after_leaving(dashboard):
    for number in range(3 * MAX_LEFT):
        robot = dashboard.join(number, "p0", FakePolicy(), "")
        asked_and_answered(dashboard, robot, at=1.0, until=2.0)
        dashboard.leave(robot, 3.0)
    dashboard.leave(dashboard.join(99, "p0", FakePolicy(), ""), 3.0)  # sent no request
    robots = dashboard.summary(3.0, {})["robots"]
    assert [robot["number"] for robot in robots] == list(range(2 * MAX_LEFT, 3 * MAX_LEFT))
    assert all(robot["left"] for robot in robots)
    assert dashboard.summary(3.0 + FORGET_AFTER, {})["robots"] == []


def test_latency_per_second_of_the_last_minute():
    timeline = Timeline()
    for at, seconds in ((0.0, 1.0), (70.2, 0.1), (70.9, 0.3), (72.0, 0.2)):
        timeline.add(at, answer(seconds))
    assert timeline.rows(75.0) == [
        {"ago": 5, "requests": 2, "queue_ms": 200.0, "infer_ms": 400.0, "slowest_ms": 900.0},
        {"ago": 3, "requests": 1, "queue_ms": 200.0, "infer_ms": 400.0, "slowest_ms": 600.0},
    ]
    assert timeline.rate(75.0) == 3 / 5
    for at in range(300):
        timeline.add(100.0 + at, answer())
    assert len(timeline.rows(399.0)) == module.SECONDS


def test_large_images_are_shrunk():
    data = module.encode_jpeg(np.zeros((1080, 1920, 3), np.uint8))
    assert Image.open(io.BytesIO(data)).size == (480, 270)
