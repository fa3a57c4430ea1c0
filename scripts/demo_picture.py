"""Create the README's animated image: the videos of `torchpi demo`, one per task, side by side.

    .venv/bin/torchpi demo --episodes 1 --seed 1 --out torchpi_demo
    .venv/bin/python scripts/demo_picture.py torchpi_demo docs/demo.webp

A video that ends earlier stays at its last frame. Every second frame is shown for twice its duration.
"""

import pathlib
import sys

import av
from PIL import Image

COLUMNS, WIDTH, EVERY, HOLD = 3, 960, 2, 15
"""Videos per row, width in pixels, frame step, and number of frames for which the last one is held."""


def tiles(folder: pathlib.Path) -> list[list[Image.Image]]:
    """Frames of each video, resized to their tile in the image."""
    videos = []
    for path in sorted(folder.glob("*_0.mp4")):
        with av.open(str(path)) as container:
            images = [frame.to_image() for frame in container.decode(video=0)][::EVERY]
        size = (WIDTH // COLUMNS, round(images[0].height * WIDTH / COLUMNS / images[0].width))
        videos.append([image.resize(size, Image.Resampling.LANCZOS) for image in images])
    return videos


def draw(videos: list[list[Image.Image]]) -> list[Image.Image]:
    """Compose the frames of the animated image."""
    width, height = videos[0][0].size
    frames = []
    for index in range(max(map(len, videos)) + HOLD):
        frame = Image.new("RGB", (COLUMNS * width, -(-len(videos) // COLUMNS) * height))
        for tile, video in enumerate(videos):
            corner = (tile % COLUMNS * width, tile // COLUMNS * height)
            frame.paste(video[min(index, len(video) - 1)], corner)
        frames.append(frame)
    return frames


def main() -> None:
    folder, out = map(pathlib.Path, sys.argv[1:])
    first, *others = draw(tiles(folder))
    with av.open(str(next(folder.glob("*_0.mp4")))) as container:
        rate = float(container.streams.video[0].average_rate)
    duration = round(1000 * EVERY / rate)
    first.save(out, save_all=True, append_images=others, duration=duration, loop=0, quality=70, method=4)
    print(f"{out}: {len(others) + 1} frames, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
