"""How well trackers keep objects apart, and the time that they add to a frame: the figures of docs/tracking.md.

    pip install -e ".[tracking]"
    python docs/scripts/tracking.py [--weights RUN] [--videos 5] [--frames 300] [--only TRACKER ...] [--keep DIR]

It draws videos of the built-in objects, which walk through each other at known places. The trackers get the true boxes
with the faults of a detector: boxes that tremble, scores that fall where an object is half hidden, misses, and boxes of
nothing. With ``--weights`` a trained model predicts on the same videos as ``mvision predict --track`` does. MOTA, HOTA,
IDF1 and changes of identity are computed by the package ``trackers``, whose figures are those of TrackEval.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trackers.eval import evaluate_mot_sequences

from mvision.builtin.animals import dog
from mvision.builtin.backdrop import make_backdrop
from mvision.builtin.canvas import Sprite, overlap, paste, render
from mvision.builtin.person import person
from mvision.builtin.things import ball, car
from mvision.inference.mot import mot_lines
from mvision.inference.predict_sources import predict_sources
from mvision.inference.reading import Frame
from mvision.inference.sources import Source
from mvision.inference.tracking import METHODS, WEAK, Tracker
from mvision.inference.video_file import VideoWriter
from mvision.structures import Category, Instances

SIZE, RATE = (240, 320), 25.0  # height, width; frames per second
CAST = ("person", "person", "person", "person", "dog", "dog", "car", "car", "ball", "ball")
NAMES = ("person", "dog", "car", "ball")
MAKERS = {"dog": dog, "car": car, "ball": ball}
LABELLED = 0.3  # an object of which less is in sight is not counted, as in the built-in data set
DETECTED = 0.1  # and of which less is in sight is not found


@dataclass
class Seen:
    """An object in a frame: its number from 1 on, class, box of what is in sight (xyxy in pixels), and the share."""

    number: int
    label: int
    box: tuple[float, float, float, float]
    share: float


@dataclass
class Actor:
    """An object that walks about: it turns back at the borders, and its path winds."""

    label: int
    sprite: Sprite
    place: np.ndarray
    step: np.ndarray
    phase: float

    def move(self, frame: int) -> None:
        """Go to where it is in this frame."""
        self.place = self.place + self.step * (1 + 0.5 * np.sin(self.phase + frame / 11))
        room = np.array(SIZE[::-1])
        middle = self.place + np.array(self.sprite.parts.shape[::-1]) / 2
        self.step = np.where((middle < 0) | (middle > room), np.sign(room / 2 - middle) * abs(self.step), self.step)
        self.sprite.left, self.sprite.top = (int(v) for v in self.place.round())


def video(seed: int, frames: int) -> Iterator[tuple[np.ndarray, list[Seen]]]:
    """(H, W, 3) uint8 RGB and the objects, frame by frame. Later members of the cast walk in front of earlier ones."""
    rng = np.random.default_rng(seed)
    ground = make_backdrop(rng, *SIZE, "park").image
    cast = []
    for name in rng.permutation(CAST).tolist():
        shapes = person(rng).shapes if name == "person" else MAKERS[name](rng)
        sprite = render(shapes, rng.uniform(30, 75), (0, 0), (0.6, -0.8))
        place = rng.uniform((0, 0), (SIZE[1] - 50, SIZE[0] - 50))
        step = rng.uniform(0.5, 2.5) * rng.choice([-1, 1], 2) * rng.uniform(0.3, 1, 2)
        cast.append(Actor(NAMES.index(name), sprite, place, step, rng.uniform(0, 6)))
    for frame in range(frames):
        image, taken, seen = ground.copy(), np.zeros(SIZE, bool), []
        for actor in cast:
            actor.move(frame)
            paste(image, actor.sprite)
        for number, actor in reversed(list(enumerate(cast, start=1))):
            window, part = overlap(SIZE, actor.sprite)
            if part is None:
                continue
            mask = actor.sprite.mask
            visible = mask[part] & ~taken[window]
            taken[window] |= mask[part]
            if visible.any():
                rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
                top, left = window[0].start, window[1].start
                box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
                seen.append(Seen(number, actor.label, box, visible.sum() / mask.sum()))
        yield image, seen


def detections(seen: list[Seen], rng: np.random.Generator) -> Instances:
    """What a detector of middling quality would find."""
    boxes, scores, labels = [], [], []
    for one in seen:
        if one.share < DETECTED or rng.random() < 0.05:
            continue
        x0, y0, x1, y1 = one.box
        extent = np.array([x1 - x0, y1 - y0] * 2)
        boxes.append(np.array(one.box) + rng.normal(0, 0.03, 4) * extent)
        scores.append(np.clip(0.9 * one.share**0.7 + rng.normal(0, 0.12), 0.01, 0.99))
        labels.append(one.label)
    for _ in range(rng.poisson(0.5)):
        corner, extent = rng.uniform(0, (SIZE[1] - 60, SIZE[0] - 60)), rng.uniform(20, 60, 2)
        boxes.append(np.concatenate((corner, corner + extent)))
        scores.append(rng.uniform(0.05, 0.65))
        labels.append(int(rng.integers(len(NAMES))))
    order = np.argsort(-np.array(scores), kind="stable")
    limits = np.array(SIZE[::-1] * 2)
    return Instances(
        boxes=np.array(boxes, np.float32).reshape(-1, 4).clip(0, limits).astype(np.float32)[order],
        scores=np.array(scores, np.float32)[order],
        labels=np.array(labels, np.int64)[order],
        size=SIZE,
        categories=[Category(id=index, name=name) for index, name in enumerate(NAMES)],
    )


def write_videos(folder: Path, count: int, frames: int) -> list[list[tuple[np.ndarray, list[Seen]]]]:
    """The videos as ``0.mp4``, ..., and their truth in the format of the MOT challenge as ``truth/0.txt``, ..."""
    (folder / "truth").mkdir(parents=True)
    videos = []
    for seed in range(count):
        videos.append(list(video(seed, frames)))
        source = Source("video", str(seed), str(seed))
        writer, lines = VideoWriter(folder / f"{seed}.mp4", source, RATE, SIZE), []
        for index, (image, seen) in enumerate(videos[-1]):
            writer.add(image, index / RATE)
            for one in seen:
                if one.share >= LABELLED:
                    x0, y0, x1, y1 = one.box
                    lines.append(f"{index + 1},{one.number},{x0},{y0},{x1 - x0},{y1 - y0},1,1,{one.share:.3f}\n")
        writer.close()
        (folder / "truth" / f"{seed}.txt").write_text("".join(lines), encoding="ascii")
    return videos


def track_detections(
    folder: Path, videos: list[list[tuple[np.ndarray, list[Seen]]]], method: str, weak: bool, threshold: float
) -> float:
    """Write the tracks of noisy boxes to ``folder``; milliseconds of CPU time a frame."""
    folder.mkdir()
    spent = count = 0.0
    for seed, frames in enumerate(videos):
        rng, tracker, lines = np.random.default_rng([seed, 1]), Tracker(method, threshold, RATE), []
        for index, (image, seen) in enumerate(frames):
            found = detections(seen, rng)
            lowest = WEAK if weak and METHODS[method].weak else threshold
            found = found.filter(found.scores >= lowest)
            started = time.process_time()
            found = tracker.update(found, image, index / RATE)
            spent, count = spent + time.process_time() - started, count + 1
            frame = Frame(Source("video", "", ""), None, index)
            lines.append(mot_lines(frame, found))
        (folder / f"{seed}.txt").write_text("".join(lines), encoding="ascii")
    return 1000 * spent / count


def row(name: str, folder: Path, truth: Path, milliseconds: float) -> str:
    """A line of the table."""
    all_of_them: Any = evaluate_mot_sequences(truth, folder, metrics=["CLEAR", "HOTA", "Identity"]).aggregate
    clear, hota, identity = all_of_them.CLEAR, all_of_them.HOTA, all_of_them.Identity
    figures = [f"{100 * value:.1f}" for value in (hota.HOTA, clear.MOTA, identity.IDF1)]
    return f"| {' | '.join([name, *figures, str(clear.IDSW), f'{milliseconds:.1f}'])} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="a trained detector of the built-in classes")
    parser.add_argument("--videos", type=int, default=5)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="TRACKER")
    parser.add_argument("--keep", type=Path, help="a new folder for the videos and the tracks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary) / "videos"
        videos = write_videos(root, arguments.videos, arguments.frames)
        rows = ["| tracker | HOTA | MOTA | IDF1 | id switches | CPU ms a frame |", "|---|---|---|---|---|---|"]
        print("\n".join(rows))
        for method in arguments.only:
            for weak in (True, False) if METHODS[method].weak else (False,):
                name = f"{method}, nothing below the threshold" if METHODS[method].weak and not weak else method
                folder = root / f"{method}-{weak}"
                spent = track_detections(folder, videos, method, weak, arguments.threshold)
                print(row(name, folder, root / "truth", spent), flush=True)
        if arguments.weights:
            with_model(arguments.weights, root, arguments.videos, arguments.threshold, arguments.only)


def with_model(weights: str, root: Path, videos: int, threshold: float, only: list[str]) -> None:
    """The same with a model, and what ``mvision predict`` takes with and without tracking."""
    from mvision.deploy.runtimes import open_fastest

    model, runtime = open_fastest(weights, [], torch.device("cpu"))
    print(runtime)
    files = [str(root / f"{seed}.mp4") for seed in range(videos)]
    plain = predict_sources(model, files[:1], root / "warm-up", threshold, progress=False)
    for method in (None, *only):
        for pictures in (True, False):
            folder = root / f"model-{method}-{pictures}"
            found = predict_sources(model, files, folder, threshold, progress=False, pictures=pictures, track=method)
            spent = 1000 * found.seconds / found.images
            if method is None:
                plain = found
                print(f"no tracking, {'with' if pictures else 'without'} pictures: {spent:.1f} ms a frame")
            elif pictures:
                print(row(method, folder, root / "truth", spent), flush=True)
            else:
                print(f"  without pictures: {spent:.1f} ms a frame ({plain.images} frames)")


if __name__ == "__main__":
    main()
