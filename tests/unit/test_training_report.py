"""The report of a training run, from complete, incomplete and damaged run folders."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from torchpi.training.config import TrainConfig
from torchpi.training.curves import MAX_POINTS, plot_curves, thin
from torchpi.training.report import IMAGE_BYTES, write_report
from torchpi.training.run_folder import parse_metrics, read_metrics, without_overtaken

DIMS = ("delta_x", "delta_y", "delta_z", "gripper")
ABOUT = {
    "command": "torchpi train --dataset recorded --out RUN",
    "started": "2026-01-02T08:00:00+00:00",
    "finished": "2026-01-02T10:05:00+00:00",
    "device": "a <fast> GPU",
    "world_size": 2,
    "datasets": [{"dataset": "recorded", "episodes": 600, "tasks": ["open the drawer", "close the faucet"]}],
    "parameters": [
        {"part": "backbone", "trainable": 0, "frozen": 2_000_000, "dtype": "bfloat16"},
        {"part": "expert", "trainable": 1_000_000, "frozen": 0, "without_gradient": 500, "dtype": "float32"},
    ],
    "init": {
        "source": "pi05_base",
        "loaded": 810,
        "fresh": ["action_in"],
        "left_out": {"llm": "unused"},
        "adapted": "",
    },
}


def metrics_line(step, **more):
    return {
        "step": step,
        "loss": 1 / step,
        "grad_norm": 1.0,
        "param_norm": 30.0,
        "lr": 1e-4,
        "samples_per_second": 100.0,
        "data_wait": 0.1,
        "memory": 3 * 2**30,
        "epoch": step / 50,
        **more,
    }


def evaluation(error):
    return {
        "holdout_loss": error,
        "chunk_error": error,
        "chunk_error_dims": {name: error * (1 + i) for i, name in enumerate(DIMS)},
        "chunk_error_steps": [error, 2 * error, 3 * error],
        "success_rate": 0.75,
        "success": {"<b>reach</b>": {"success_rate": 0.75, "interval": [0.5, 0.875], "episodes": 20}},
    }


def write_run(run, lines, *, tail="", **recipe):
    run.mkdir(parents=True, exist_ok=True)
    config = {**json.loads(TrainConfig().to_json()), "dataset": "recorded", "embodiment": "metaworld", **recipe}
    (run / "train.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + tail)
    return run


def write_image(path, size=(40, 30)):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished run with its report; tests must not change it."""
    lines = [metrics_line(step, **(evaluation(2 / step) if step % 20 == 0 else {})) for step in range(10, 101, 10)]
    run = write_run(tmp_path_factory.mktemp("runs") / "run", lines, num_steps=100, lr=1e-3)
    (run / "run.json").write_text(json.dumps(ABOUT))
    for step in (20, 100):
        write_image(run / "plots" / f"{step:08d}_chunks.png")
        write_image(run / "plots" / f"{step:08d}_errors.png")
    (run / "checkpoints" / "00000100" / "policy").mkdir(parents=True)
    (run / "report.html").write_text("an older page")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(full):
    return check_page(full)


@pytest.fixture
def bare(tmp_path):
    """A run without metrics."""
    return write_run(tmp_path / "run", [])


class Page(html.parser.HTMLParser):
    """A parsed HTML page; checks that its tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def page_of(run):
    assert write_report(run) == run / "report.html"
    return check_page(run)


def check_page(run):
    """Parse the page of a run; check that it is self-contained and that its plots have descriptions."""
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3e6
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    references = [value for name in ("src", "href", "xlink:href") for value in page.attributes(name)]
    assert all(value.startswith(("data:image/", "#")) for value in references)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in references if value.startswith("#")} <= set(ids)
    assert {value[1:] for value in re.findall(r"url\((.*?)\)", text)} <= set(ids)
    assert "http" not in re.sub(r'"data:image/[^"]*"', "", text)
    for tag, attributes in page.tags:
        if tag in ("svg", "img"):
            described = attributes.get("aria-label") or attributes.get("alt")
            assert "x: " in described
            assert "y: " in described
    return page


# Contents of the page


def test_page_shows_all_parts_of_the_run(page):
    assert "From random weights, on recorded: trained to the end." in page.text
    for part in ("100 steps of 100", "2 epochs", "2 h 05 min", "75% success in simulation"):
        assert part in page.text
    titles = (
        "Curves", "Success in simulation", "Sampled chunks", "Plots", "Parameters",
        "Data and initial weights", "Recipe", "Commands",
    )  # fmt: skip
    assert all(page.text.count(title) >= 2 for title in titles)  # in the navigation too
    # 8 panels and two plots of chunk errors as SVG; the latest two plots as images
    assert [tag for tag, _ in page.tags].count("svg") == 10
    assert [tag for tag, _ in page.tags].count("img") == 2
    assert "After 100 steps." in page.text
    assert "Not recorded" not in page.text
    assert "interrupted" not in page.text


def test_page_escapes_text(full):
    text = (full / "report.html").read_text(encoding="utf-8")
    assert "<b>reach" not in text
    assert "&lt;b&gt;reach&lt;/b&gt;" in text
    assert "a &lt;fast&gt; GPU" in text


def test_parameters_are_counted_by_part(page):
    text = page.text
    assert "1.00 million of 3.00 million parameters are trainable." in text
    assert "part trainable frozen without gradient dtype" in text
    assert "backbone 0 2 000 000 0 bfloat16" in text
    assert "all 1 000 000 2 000 000 500" in text


def test_data_and_initial_weights_are_listed(page):
    for part in (
        "weights from pi05_base",
        "parameters loaded 810",
        "initialized at random action_in",
        "llm: unused",
        "data: episodes 600",
        "data: tasks open the drawer, close the faucet",
        "device a <fast> GPU",
    ):
        assert part in page.text


def test_mixture_shows_errors_and_plots_per_robot(tmp_path):
    mixture = [{"dataset": "hf://org/first", "embodiment": "metaworld"}, {"dataset": "second", "embodiment": "droid"}]
    more = {"chunk_error_droid": 0.5, "chunk_error_dims_droid": {"x": 0.5}, "chunk_error_steps_droid": [0.5, None]}
    run = write_run(tmp_path / "run", [metrics_line(10, **evaluation(0.2), **more)], dataset="", mixture=mixture)
    for name in ("00000010_chunks", "00000005_chunks_droid", "00000010_chunks_droid"):
        write_image(run / "plots" / f"{name}.png")
    (run / "checkpoints" / "00000010" / "policy").mkdir(parents=True)
    page = page_of(run)
    assert "From random weights, on first: step 10 of" in page.text
    assert "first robot: 0.2, droid: 0.5 at the end" in page.text
    assert all(f"Error {what} of {robot}" in page.text for what in ("per dimension", "over the chunk")
               for robot in ("first robot", "droid"))  # fmt: skip
    assert len(page.attributes("src")) == 2
    assert "droid: Sampled and recorded chunks" in page.text
    assert "eval checkpoints/00000010/policy --dataset hf://org/first" in page.text


def test_changed_recipe_fields_are_marked(full):
    text = (full / "report.html").read_text(encoding="utf-8")
    changed = re.findall(r'<tr class="marked"><td class="name">(.*?)</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', text)
    assert ("lr", "0.001", f"{TrainConfig().optim.lr:g}") in changed
    assert {name for name, _, _ in changed} == {"dataset", "embodiment", "lr", "num_steps"}
    fields = re.findall(r'<td class="name">[a-z_.]+</td><td class="wide">', text)
    assert f"4 of {len(fields)} fields differ" in text


def test_commands_name_the_last_policy_relative_to_the_run(page):
    policy, text = "checkpoints/00000100/policy", page.text
    for command in (f"doctor {policy}", f"eval {policy} --env metaworld --episodes 20", f"serve {policy}"):
        assert f"torchpi {command}" in text
    assert "--resume" not in text
    assert "--dataset ../recorded" not in text


def test_commands_name_the_dataset_relative_to_the_run(bare, monkeypatch):
    monkeypatch.chdir(bare.parent)
    (bare.parent / "recorded" / "meta").mkdir(parents=True)
    (bare / "checkpoints" / "00000100" / "policy").mkdir(parents=True)
    assert "torchpi eval checkpoints/00000100/policy --dataset ../recorded" in page_of(bare).text


def test_large_plot_is_compressed(bare):
    path = bare / "plots" / "00000100_chunks.png"
    write_image(path, (1200, 800))
    assert path.stat().st_size > IMAGE_BYTES
    assert [source[:15] for source in page_of(bare).attributes("src")] == ["data:image/jpeg"]


def test_truncated_plot_is_reported(bare):
    path = bare / "plots" / "00000100_errors.png"
    write_image(path)
    path.write_bytes(path.read_bytes()[:100])
    assert "00000100_errors.png cannot be shown" in page_of(bare).text


def test_report_writes_only_the_page(full):
    assert sorted(path.name for path in full.iterdir() if path.is_file()) == [
        "metrics.jsonl", "report.html", "run.json", "train.json",
    ]  # fmt: skip


# Incomplete and damaged runs


@pytest.mark.parametrize("lines", [0, 3])
def test_report_of_a_run_that_has_just_started(tmp_path, lines):
    run = write_run(tmp_path / "run", [metrics_line(step) for step in range(1, lines + 1)], tail='{"step": 4, "lo')
    page = page_of(run)
    assert "it is running, or was killed" in page.text
    assert "Not recorded: run.json, " in page.text
    assert "a checkpoint" in page.text
    assert "There is no checkpoint yet" in page.text
    assert "cannot be read" not in page.text  # an incomplete last line is normal
    assert [tag for tag, _ in page.tags].count("svg") == (6 if lines else 0)


def test_report_of_a_stopped_run_shows_the_resume_command(tmp_path):
    run = write_run(tmp_path / "run", [metrics_line(10)], num_steps=100)
    (run / "checkpoints" / "00000012" / "policy").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"finished": "2026-01-02T10:05:00+00:00", "parameters": 3}))
    text = page_of(run).text
    assert "step 12 of 100; it was stopped before the last step." in text
    assert "datasets in run.json, init in run.json" in text
    assert "torchpi train --resume ." in text


def test_non_finite_values_are_reported_and_not_drawn(tmp_path):
    lines = [metrics_line(step, loss=math.nan if step > 3 else 1.0, grad_norm=math.inf) for step in range(1, 7)]
    text = page_of(write_run(tmp_path / "run", [*lines, metrics_line(7, **evaluation(math.nan))])).text
    assert "loss is not finite in 3 of 7 lines, first at step 4." in text
    assert "grad_norm is not finite in 6 of 7 lines, first at step 1." in text


def test_damaged_files_are_reported(tmp_path):
    run = write_run(tmp_path / "run", [metrics_line(1)], tail="\0\0\n[1]\n" + json.dumps(metrics_line(2)) + "\n")
    (run / "run.json").write_text('{"device": ')
    text = page_of(run).text
    assert "metrics.jsonl has 2 lines that cannot be read, first in line 2; skipped here." in text
    assert "run.json is not valid JSON: Expecting value" in text
    assert "2 steps of" in text


def test_interruptions_are_reported(tmp_path):
    lines = [metrics_line(step) for step in (10, 20, 30)] + [metrics_line(20), metrics_line(25, resumed=True)]
    text = page_of(write_run(tmp_path / "run", lines)).text
    assert "The run was interrupted and resumed; the first lines after that are of step 20, 25." in text
    assert "25 steps of" in text


def test_folder_without_a_run_raises_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither train\.json nor metrics\.jsonl"):
        write_report(tmp_path)


def test_recipe_of_another_version_is_shown(tmp_path):
    run = write_run(tmp_path / "run", [], optimizer={"name": "adamw", "betas": [0.9, 0.95]})
    assert "optimizer.betas 0.9, 0.95" in page_of(run).text


def test_constant_dimensions_are_named(tmp_path):
    dims = {"joint": 0.25, "gripper": None}
    text = page_of(write_run(tmp_path / "run", [metrics_line(10, chunk_error=0.25, chunk_error_dims=dims)])).text
    assert "joint 0.2500 gripper constant" in text
    assert "a fraction of the held-out episodes' action range" in text


def test_plots_of_earlier_versions_are_shown(bare):
    write_image(bare / "pictures" / "00000100_chunks.png")
    assert len(page_of(bare).attributes("src")) == 1


# Curves


def test_lines_made_obsolete_by_a_resume_are_dropped():
    lines = [{"step": step, "run": run} for run, step in ((1, 10), (1, 20), (1, 30), (2, 20), (2, 20), (2, 40))]
    assert [(line["run"], line["step"]) for line in without_overtaken(lines)] == [
        (1, 10), (1, 20), (2, 20), (2, 20), (2, 40),
    ]  # fmt: skip


def test_metrics_are_read_without_a_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}')  # complete except for the line break
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2, ')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match='line 2 is no JSON object with a "step"'):
        read_metrics(path)
    assert parse_metrics("") == ([], [])


def test_thinned_series_keeps_its_range():
    steps = np.arange(100_000)
    values = np.sin(steps.astype(np.float64))
    values[777], values[5000:5400], values[99_999] = 9.0, math.nan, -7.0
    points = thin(steps, values)
    assert len(points.steps) == MAX_POINTS
    assert (np.nanmax(points.high), np.nanmin(points.low)) == (9.0, -7.0)
    assert np.isnan(points.mean).any()
    finite = np.isfinite(points.mean)
    assert (points.low[finite] <= points.mean[finite]).all()
    few = thin(steps[:3], values[:3])
    assert np.array_equal(few.mean, values[:3])
    assert np.array_equal(few.steps, [0, 1, 2])


@pytest.mark.parametrize("lines", [[], [metrics_line(10)], [metrics_line(s, **evaluation(1 / s)) for s in (1, 2, 30)]])
def test_curves_are_plotted_to_a_png(tmp_path, lines):
    run = write_run(tmp_path / "run", lines)
    plot_curves(run / "metrics.jsonl", run / "curves.png")
    with Image.open(run / "curves.png") as image:
        assert image.width == 1210


@pytest.mark.slow
def test_page_of_a_very_long_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    dims = {f"joint_{i}": 0.5 for i in range(32)}
    lines = [metrics_line(step, loss=rng.random()) for step in range(1, 100_001)]
    for line in lines[::100]:
        line |= evaluation(rng.random()) | {"chunk_error_dims": dims, "chunk_error_steps": [0.1] * 50}
    page_of(write_run(tmp_path / "run", lines))  # check_page checks the size


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_browser_renders_the_page(full, tmp_path, width):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium")
    screenshot = tmp_path / "page.png"
    arguments = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000", f"--window-size={width},3000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={screenshot}", (full / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run([chromium, *arguments], check=True, capture_output=True, timeout=120)
    with Image.open(screenshot) as image:
        assert image.width == width
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x2F, 0x66, 0xD0), (0x0D, 0x85, 0x77)} <= colors  # colours of the curves
