"""Prediction on sources (files, folders, videos, cameras, URLs) into a folder of pictures and ``predictions.json``."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvision.drawing import unwritable
from mvision.errors import UserError, printable
from mvision.inference.large_images import ArrayPicture, Picture, PreparedPicture
from mvision.inference.output import ForMetrics, Output
from mvision.inference.pipeline import ordered_map
from mvision.inference.predict import WORKERS, Predictor, Prepared, eval_mode, infer
from mvision.inference.reading import Frame, read_frames
from mvision.inference.selection import DEFAULT_THRESHOLD, Selection, Threshold
from mvision.inference.sources import Sources, find_sources
from mvision.inference.summary import Summary
from mvision.inference.tile_merge import Merged
from mvision.inference.tiled import Found, as_instances, count_tiles, file_size, infer_tiled
from mvision.inference.tiles import Tiling
from mvision.inference.tracked import TrackedVideos
from mvision.structures import Category, Instances
from mvision.structures.images import BadImage, resize_image


def predict_sources(
    model: Predictor,
    sources: Sequence[str | Path] | Sources,
    output: Path,
    threshold: Threshold = DEFAULT_THRESHOLD,
    batch_size: int | None = None,
    progress: bool = True,
    *,
    multi_label: bool = False,
    nms: float | None = None,
    for_metrics: ForMetrics | None = None,
    pictures: bool = True,
    track: str | None = None,
    tiling: Tiling | None = None,
) -> Summary:
    """Predict on files, folders, globs, videos, streams and cameras; write pictures and ``predictions.json``.

    ``output`` gets one picture per image under the same stem (below the same folders), one MP4 per video or camera, and
    ``predictions.json``, a COCO results list whose entries also name the file, the class and, in videos, the frame and
    its time. ``image_id`` there is that of the source, or else numbers all images from 1 in their order. Reading,
    inference, drawing and writing overlap, and memory does not grow with the number of images. No file is left
    incomplete: after Ctrl-C or on a full disk there are complete pictures and no ``predictions.json``. Ctrl-C is how a
    camera's recording or a stream usually ends, so with one of them the results up to then are kept.

    Args:
        model: in any mode, which it keeps.
        sources: see ``find_sources``; or what it has found.
        output: a folder; made if missing, files of an earlier run are replaced.
        threshold, multi_label, nms: see ``predict_images``.
        batch_size: images per forward pass; None is 1 on CPU, where more do not help, and 8 elsewhere.
        progress: show a progress bar.
        for_metrics: for the images of a data set, what ``predictions.json`` holds in place of what the pictures show.
        pictures: without, nothing is drawn, and ``predictions.json`` is the only file.
        track: follow the objects of videos, streams and cameras by this method, see ``Tracker``: ``track_id`` in their
            entries, and a text file for each. ``threshold`` starts tracks; weaker detections can continue them.
        tiling: predict on tiles, see ``infer_tiled``; ``batch_size`` then counts these.

    Raises:
        UserError: a source that is missing or cannot be read (in folders and globs: if none can), a folder that cannot
            be written, a threshold or IoU outside 0..1, a class that the model does not have, no video to track.
    """
    chosen = [Selection(threshold, multi_label, nms), *([] if for_metrics is None else [for_metrics.selection])]
    for selection in chosen:
        selection.check(model.config.categories)
    inputs = sources if isinstance(sources, Sources) else find_sources(sources, leave_out=output)
    videos = None if track is None else TrackedVideos(inputs, track, chosen[0])
    started = time.monotonic()
    with Output(output, inputs, for_metrics, pictures, tracks=videos is not None) as writer:
        try:
            with eval_mode(model):
                _run(model, inputs, writer, chosen, batch_size, progress, tiling, videos)
        except KeyboardInterrupt:
            if not any(source.is_live for source in inputs):
                raise
        summary = writer.summary
        _refuse_if_none_was_read(summary, len(inputs))
    _add_notes(summary, inputs, model.config.categories if pictures else [], videos)
    summary.seconds = time.monotonic() - started
    return summary


def _refuse_if_none_was_read(summary: Summary, sources: int) -> None:
    if not summary.images and summary.skipped:
        name, reason = summary.skipped[0]
        raise UserError(f"none of {sources} sources can be read; the first is {name}: {reason}")


def _add_notes(
    summary: Summary, inputs: Sources, drawn: Sequence[Category], videos: TrackedVideos | None = None
) -> None:
    """What the user is told of the sources, and of the names of classes that were drawn."""
    summary.skipped += inputs.skipped
    summary.notes += inputs.notes()
    if videos is not None:
        summary.tracks = videos.counts
        summary.notes += videos.notes()
    if summary.instances and (numbered := unwritable(drawn)):
        shown = ", ".join(f"{number} is {printable(name)}" for number, name in list(numbered.items())[:3])
        summary.notes.append(
            f"{len(numbered)} class names are drawn as numbers, because no font here has their characters ({shown}); "
            "fonts such as Noto have them"
        )


def _run(
    model: Predictor,
    inputs: Sources,
    writer: Output,
    chosen: Sequence[Selection],
    batch_size: int | None,
    progress: bool,
    tiling: Tiling | None = None,
    videos: TrackedVideos | None = None,
) -> None:
    """Stages that overlap, by default: decode, resize, infer (in this thread), post-process, track, draw and encode,
    write.

    With several forward passes at once, post-processing belongs to them.
    """
    size, pixel_range = model.config.image_size, model.config.pixel_range
    chosen = chosen if videos is None else videos.chosen
    ahead = WORKERS if tiling is None else 2  # pictures for tiles are larger, and each is work for longer
    read = partial(read_frames, inputs, ahead, pixel_range, size, writer.pictures)
    total = len(inputs) if all(source.kind == "image" for source in inputs) else None
    bar = tqdm(desc="predicting", total=total, unit="img", disable=None if progress else True, leave=False)
    if tiling is not None:
        bar.total, bar.unit = None, "tile"
        inferred = _inferred_on_tiles(model, inputs, read(tiling), chosen, batch_size, tiling, bar)
    else:
        at_once = _wanted_at_once(inputs)
        prepared = ordered_map(partial(_prepare_frame, size), read(), workers=2, ahead=0 if at_once == 1 else 2)
        inferred = infer(model, prepared, chosen, batch_size, at_once)
    if videos is not None:
        inferred = ordered_map(videos.follow, inferred, workers=1, ahead=1)
    numbered = ((number, frame, found) for number, (frame, found) in enumerate(inferred, start=1))
    rendered = ordered_map(writer.render, numbered, WORKERS, ahead=WORKERS)
    with bar, closing(ordered_map(writer.add, rendered, workers=1, ahead=1)) as written:
        for _ in written:
            if tiling is None:
                bar.update()


def _inferred_on_tiles(
    model: Predictor,
    inputs: Sources,
    frames: Generator[Frame, None, None],
    chosen: Sequence[Selection],
    batch_size: int | None,
    tiling: Tiling,
    bar: tqdm[Any],
) -> Generator[tuple[Frame, list[Instances] | None], None, None]:
    """As ``infer``: every frame with its results, once for every selection."""
    tiles = None
    if all(source.kind == "image" for source in inputs):
        tiles = count_tiles((file_size(source.path) for source in inputs), tiling, batch_size or 1)
    pictures = ((frame, _picture(frame, tiling, model.config.image_size)) for frame in frames)
    with closing(frames), closing(infer_tiled(model, pictures, tiling, chosen, batch_size, tiles, bar.update)) as found:
        for frame, of_frame in found:
            if isinstance(of_frame, BadImage):
                if frame.source.required:
                    raise UserError(f"source {frame.source.shown}: {of_frame.reason}") from of_frame
                frame.problem = of_frame.reason
                yield frame, None
            else:
                yield frame, None if of_frame is None else [_in_pixels_of(frame, one) for one in of_frame]


def _picture(frame: Frame, tiling: Tiling, size: tuple[int, int]) -> Picture | None:
    """What tiles are cut from; a picture that is a single tile is prepared as without tiles."""
    if frame.large is not None:
        return frame.large
    if frame.image is None or len(tiling.grid(frame.size)) == 1:
        _, model_input, labelled = _prepare_frame(size, frame)
        return None if model_input is None else PreparedPicture(model_input, labelled)
    return ArrayPicture(frame.image)


def _in_pixels_of(frame: Frame, found: Found) -> Instances:
    """Results in the pixels that the data set's annotations are in, and at the size at which the frame is drawn."""
    if isinstance(found, Merged) and frame.reduced and frame.large is not None and frame.shown is None:
        frame.shown = found.reduced(frame.large.reduced().shape[:2])
    instances = as_instances(found)
    size = frame.source.size or frame.size
    return instances if instances.size == size else instances.resized(size)


def _wanted_at_once(inputs: Sources) -> int | None:
    """How many pictures there are to work on at the same time; None: not known, but many."""
    if any(source.is_live for source in inputs):
        return 1  # its pictures come one by one, and each is wanted soon
    return len(inputs) if all(source.kind == "image" for source in inputs) else None


def _prepare_frame(size: tuple[int, int], frame: Frame) -> Prepared[Frame]:
    model_input = frame.model_input
    if model_input is None:
        model_input = None if frame.image is None else resize_image(frame.image, size)
    # Results are in the pixels that the data set's annotations are in, where the picture is of a data set.
    return frame, model_input, frame.source.size or frame.size
