"""HTML page of an evaluation: success per task, settings and videos."""

import base64
import os
import pathlib
from html import escape
from urllib.parse import quote

from torchpi.errors import counted
from torchpi.sim.result import Episode, Evaluation, success_table
from torchpi.ui.page import definitions, html_page, page_header


def render_evaluation(evaluation: Evaluation, folder: pathlib.Path) -> str:
    """Render the page as HTML, with links to the videos relative to the page's folder."""
    count = len(evaluation.episodes)
    low, high = evaluation.interval
    tiles = [
        (f"{evaluation.success_rate:.1%}", "success"),
        (f"{low:.1%} to {high:.1%}", "95 % interval (Wilson)"),
        (f"{sum(e.success for e in evaluation.episodes)} of {count}", "episodes succeeded"),
        (f"{evaluation.chunk_ms:.0f} ms", "for one chunk, median"),
    ]
    settings = {
        "policy": evaluation.policy,
        "seed": evaluation.seed,
        "actions executed of each chunk": evaluation.execute_steps or "half",
        "Euler steps": evaluation.num_steps or "the policy's",
        "samples of each chunk": f"{evaluation.num_samples}, {evaluation.pick}" if evaluation.num_samples else 1,
        "steps at most": evaluation.max_steps,
        "black images": "yes" if evaluation.blank_images else "no",
    }
    summary = f"{counted(count, 'episode')} in {counted(len(evaluation.tasks), 'task')}. Steps: mean of the successful."
    sections = [
        ("success", "Success", success_table(evaluation).to_html()),
        ("settings", "Settings", definitions((name, str(value)) for name, value in settings.items())),
    ]
    videos = "".join(
        video_figure(episode, evaluation.tasks[episode.task].instruction, folder)
        for episode in evaluation.episodes
        if episode.video
    )
    if videos:
        sections.append(("videos", "Videos", f'<div class="videos">{videos}</div>'))
    header = page_header("torchpi eval", evaluation.env, summary, tiles=tiles)
    return html_page(f"{evaluation.env}: {tiles[0][0]}", header=header, sections=sections, footer="")


def video_figure(episode: Episode, instruction: str, folder: pathlib.Path, *, embedded: bool = False) -> str:
    """HTML figure of an episode's video and outcome; the video is linked relative to the page's folder, or embedded."""
    path = pathlib.Path(str(episode.video))
    link = quote(pathlib.Path(os.path.relpath(path, folder)).as_posix())
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}" if embedded else link
    css, outcome = ("good", "✓ done") if episode.success else ("bad", "✗ not done")
    return (
        f'<figure><video src="{source}" controls autoplay muted loop playsinline '
        f'aria-label="{escape(episode.task)}"></video><figcaption><b>“{escape(instruction)}”</b>'
        f'<span class="outcome {css}">{outcome}</span>'
        f'<span class="mono">{escape(episode.task)} · <a href="{link}">{escape(path.name)}</a></span>'
        f'<span class="right">{counted(episode.steps, "step")}</span></figcaption></figure>'
    )
