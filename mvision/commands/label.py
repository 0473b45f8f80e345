"""``mvision label``: predictions as labels that people correct, in the formats of the tools for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mvision.commands.predict import newest_run
from mvision.data.augment.geometry import mirror_keypoints
from mvision.data.formats.label_formats import check_request, label_format
from mvision.data.formats.labelled import Request
from mvision.data.tools.label import LabelSummary, Marking, check_target, label
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.inference.predict import Predictor
from mvision.inference.selection import OTHERS, AskedThreshold, Threshold, resolve_threshold
from mvision.inference.sources import find_sources
from mvision.machine import PrecisionOption, keep_freed_memory, resolve_device
from mvision.storage.run_folder import BEST
from mvision.structures.messages import decoder_messages_hidden
from mvision.weights.stored import digest

THRESHOLD, REVIEW = 0.3, 0.5  # to delete a wrong box takes less time than to draw a missing one
POLYGON = "polygon"


def label_job(
    folder: str,
    *,
    format_name: str,
    weights: str | None = None,
    family: str | None = None,
    tasks: tuple[str, ...] = (),
    threshold: AskedThreshold | None = None,
    review: AskedThreshold | None = None,
    nms: float | None = None,
    masks: str | None = None,
    image_url: str | None = None,
    output: Path | None = None,
    device: str | None = None,
    precision: PrecisionOption = "auto",
    log: Callable[[str], None] = print,
) -> LabelSummary:
    """Predict on the pictures of a folder and write them with their objects for a tool for labelling.

    Args:
        folder: of pictures, at any depth.
        format_name: a key of ``FORMATS``.
        weights, family: any source that ``mvision.load`` takes; None: the newest run with the tasks.
        tasks: those to run; empty: all that the weights have.
        threshold: the lowest score that is written, or one for each class, see ``predict_images``; None: 0.3.
        review: objects with a lower score are marked, given as ``threshold`` is; None: 0.5.
        nms: see ``predict_images``.
        masks: ``polygon`` or ``rle``; None: polygons.
        image_url: what the addresses of pictures begin with; of Label Studio alone.
        output: a new folder; None: ``labelled``.
        device, precision: see ``open_fastest``.
        log: is called with the line that names the runtime.

    Raises:
        UserError: the folder, weights, format or options cannot be used, or the output is not empty.
    """
    form = label_format(format_name)
    if image_url is not None and format_name != "label-studio":
        raise UserError(f"--image-url: only for --format label-studio; {format_name} names the files")
    for task in tasks:
        head_class(task)
    target = output or Path("labelled")
    check_target(target)
    found = find_sources([folder], leave_out=target)
    source = str(newest_run(tasks)) if weights is None else weights
    keep_freed_memory()
    model, runtime = open_fastest(source, tasks, resolve_device(device), precision, family)
    request = _request(model, masks, source, image_url)
    check_request(form, request)
    marking = Marking(_numbers(threshold, model, THRESHOLD), _numbers(review, model, REVIEW), nms)
    settings = _settings(folder, source, model, request, marking)
    log(runtime)
    with decoder_messages_hidden():
        return label(model, found, target, form, request, marking, settings)


def _settings(folder: str, source: str, model: Predictor, request: Request, marking: Marking) -> dict[str, object]:
    """What the predictions depend on, by the name of its option: a run that goes on needs the same."""
    return {
        "source": str(Path(folder).resolve()),
        "weights": _identity(source),
        "tasks": list(model.tasks),
        "threshold": marking.threshold,
        "review": marking.review,
        "nms": marking.nms,
        "masks": request.masks,
    }


def _numbers(asked: AskedThreshold | None, model: Predictor, default: float) -> Threshold:
    """A threshold with that of the classes that it does not name."""
    given = default if asked is None else resolve_threshold(asked, model)
    return {OTHERS: default, **given} if isinstance(given, Mapping) else given


def _request(model: Predictor, masks: str | None, source: str, image_url: str | None) -> Request:
    """What the model finds, and in which form it is written."""
    heads = [head_class(task) for task in model.tasks]
    has_masks = any("masks" in head.needs or head.kind == "regions" for head in heads)
    if masks is not None and not has_masks:
        raise UserError(f"--masks {masks}: the weights find no masks (their tasks are {', '.join(model.tasks)})")
    categories = model.config.categories
    has_points = any(head.kind == "poses" for head in heads)
    mirrored: list[int] = []
    swaps = mirror_keypoints(categories)
    if has_points and swaps is not None:
        row = next(row for row, category in enumerate(categories) if category.keypoints)
        mirrored = swaps[row][: len(categories[row].keypoints)].tolist()
    return Request(
        categories=categories,
        masks=(masks or POLYGON) if has_masks else "",
        points=has_points,
        mirrored=mirrored,
        model=Path(source).as_posix(),
        image_url=image_url or "",
    )


def _identity(source: str) -> str:
    """What tells weights from others: the checksum of a file, else the name."""
    path = Path(source)
    file = path / BEST if (path / BEST).is_file() else path
    return digest(file) if file.is_file() else source
