"""The dashboard in a browser, while robots ask the embedded policy."""

import contextlib
import html
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image
from serving_helpers import one_thread

from torchpi.demo.frames import demo_observation
from torchpi.policy import load_policy
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi_client import WebsocketPolicy

TOKEN = "a+b/c"
HOSTILE = "<script>document.title=1</script><img src=x>"


@contextlib.contextmanager
def asking(url, observation):
    """A robot that asks again and again, with real-time chunking from its second request on."""
    stop = threading.Event()
    failures = []

    def ask():
        try:
            with WebsocketPolicy(url, api_key=TOKEN) as policy:
                actions = policy.infer(observation)["actions"]
                begun.set()
                while not stop.wait(0.1):
                    rest = {"action_prefix": np.ascontiguousarray(actions[8:]), "delay": 2, "execution_horizon": 8}
                    actions = policy.infer({**observation, "torchpi/rtc": rest})["actions"]
        except Exception as error:
            failures.append(error)
        finally:
            begun.set()

    begun = threading.Event()
    robot = threading.Thread(target=ask)
    robot.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        robot.join()
    assert not failures


def browse(address, folder, *arguments, width=1280):
    """The page after some seconds of the browser's own clock, as HTML."""
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--virtual-time-budget=15000", f"--window-size={width},2400",
        f"--user-data-dir={folder / 'profile'}", *arguments, address,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout


@pytest.fixture(scope="module")
def server():
    """Its address; two robots ask its two policies."""
    policy = load_policy("demo")
    settings = ServeSettings(port=0, token=TOKEN, max_batch=2)
    load = {"first": lambda: policy, "second": lambda: policy}
    observation = demo_observation("drawer-open")
    with (
        one_thread(),
        running_server(load, settings) as (url, _),
        asking(f"{url}/first", {**observation, "prompt": HOSTILE}),
        asking(f"{url}/second", {**observation, "prompt": "close the faucet"}),
    ):
        yield url.replace("ws://", "http://")


@pytest.mark.slow
def test_a_browser_shows_robots_their_frames_and_their_chunks(server, tmp_path):
    for _ in range(5):  # on a busy machine the browser's clock may run out before both robots are on the page
        page = browse(f"{server}/?token={TOKEN}", tmp_path, "--dump-dom")
        if page.count('class="infer"') >= 2:
            break
    assert "<title>torchpi serve</title>" in page  # the hostile prompt's scripts have not run …
    assert html.escape(HOSTILE, quote=False) in page  # … and it is there, as text
    assert "close the faucet" in page
    for number, policy in enumerate(("first", "second")):
        [robot] = re.findall(rf'<article class="panel robot" id="robot-{number}".*?</article>', page)
        assert f"/{policy}<" in robot
        assert re.findall(r'<img alt="camera (\w+)" src="blob:', robot) == ["base", "wrist"]
        assert re.findall(r'aria-label="(\w+)"><', robot) == ["delta_x", "delta_y", "delta_z", "gripper"]
        assert re.search(r"\d+ of 16 actions executed, (reported by the robot|estimated from the time at 80 Hz)", robot)
        assert robot.count('<rect class="infer"') >= 1
    assert "robots connected" in page
    assert TOKEN not in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_paints_plots_and_frames(server, tmp_path, width):
    screenshot = tmp_path / "page.png"
    browse(f"{server}/?token={TOKEN}", tmp_path, f"--screenshot={screenshot}", width=width)
    with Image.open(screenshot) as image:
        assert image.width == width
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert (0x2F, 0x66, 0xD0) in colors  # bars and curves, in the style sheet's colour
    assert len(colors) > 1000  # of the cameras


@pytest.mark.slow
def test_a_browser_without_the_token_sees_nothing(server, tmp_path):
    page = browse(f"{server}/", tmp_path, "--dump-dom")
    assert "A valid token is needed" in page
    assert "<script" not in page
