"""COCO's average precision for boxes, masks and keypoints: the official figures, and AP for every class.

The numbers are those of pycocotools (Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and the evaluation
described at cocodataset.org/#detection-eval): at most 100 detections per image and class (20 for keypoints), crowd
regions ignored. hotcoco computes them where it is installed, the same digits in a fraction of the time; pycocotools is
the fallback.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mvision.evaluation.ground_truth import Truth
from mvision.evaluation.metric import Metric
from mvision.evaluation.pck import FRACTION, MOST_RESULTS, correct_points
from mvision.structures import Category


class Figure(NamedTuple):
    """One line of COCO's table. ``iou`` None is the mean over 0.50:0.95; for keypoints the overlap is the OKS."""

    name: str
    kind: Literal["precision", "recall"]
    iou: float | None
    area: str
    detections: int


_BOX_FIGURES = (
    Figure("AP", "precision", None, "all", 100),
    Figure("AP50", "precision", 0.5, "all", 100),
    Figure("AP75", "precision", 0.75, "all", 100),
    Figure("AP_small", "precision", None, "small", 100),
    Figure("AP_medium", "precision", None, "medium", 100),
    Figure("AP_large", "precision", None, "large", 100),
    Figure("AR1", "recall", None, "all", 1),
    Figure("AR10", "recall", None, "all", 10),
    Figure("AR100", "recall", None, "all", 100),
    Figure("AR_small", "recall", None, "small", 100),
    Figure("AR_medium", "recall", None, "medium", 100),
    Figure("AR_large", "recall", None, "large", 100),
)
_KEYPOINT_FIGURES = (
    Figure("AP", "precision", None, "all", 20),
    Figure("AP50", "precision", 0.5, "all", 20),
    Figure("AP75", "precision", 0.75, "all", 20),
    Figure("AP_medium", "precision", None, "medium", 20),
    Figure("AP_large", "precision", None, "large", 20),
    Figure("AR", "recall", None, "all", 20),
    Figure("AR50", "recall", 0.5, "all", 20),
    Figure("AR75", "recall", 0.75, "all", 20),
    Figure("AR_medium", "recall", None, "medium", 20),
    Figure("AR_large", "recall", None, "large", 20),
)
FIGURES: dict[str, tuple[Figure, ...]] = {"bbox": _BOX_FIGURES, "segm": _BOX_FIGURES, "keypoints": _KEYPOINT_FIGURES}

# The axes of the evaluators' arrays: precision is (IoU, recall, class, area, detections), recall lacks the second.
_IOUS = np.linspace(0.5, 0.95, 10)
_AREAS = {"bbox": ("all", "small", "medium", "large"), "keypoints": ("all", "medium", "large")}
_DETECTIONS = {"bbox": (1, 10, 100), "keypoints": (20,)}


class _Found(NamedTuple):
    """Results of one image: (n, 6) float64 of x, y, w, h, score, class number, and the n masks or keypoints."""

    rows: np.ndarray
    shapes: list[Any]


class CocoMetric(Metric):
    """COCO's figures. ``BoxMetric``, ``MaskMetric`` and ``KeypointMetric`` say what is compared.

    Args:
        coco_dict: the annotations in COCO's format. Missing ``area``, ``iscrowd`` or ``num_keypoints`` are filled in.
        categories: the model's classes. They meet the data's by name; what only one side knows is not evaluated.
        sigmas: per-keypoint standard deviations of the OKS as fractions of the object's scale; None takes those of
            ``categories`` (what the model was trained for), else the data's own (of its categories or
            ``info.keypoint_sigmas``), COCO's for COCO's 17 points, or one value for all, as ``notes`` then says.
        backend: ``hotcoco`` or ``pycocotools``; None takes the faster that is installed.

    Attributes:
        notes: lines a reader of the figures should know, such as classes left out.

    Raises:
        UserError: none of the model's classes is in the data, or the annotations cannot be evaluated.
    """

    def __init__(
        self,
        coco_dict: dict[str, Any],
        categories: Sequence[Category],
        sigmas: Sequence[float] | None = None,
        backend: Literal["hotcoco", "pycocotools"] | None = None,
    ) -> None:
        super().__init__(coco_dict, categories)
        self.truth = Truth(coco_dict, self.categories, self.name, sigmas)
        self.notes = self.truth.notes
        self._backend = backend or ("hotcoco" if _has_hotcoco() else "pycocotools")
        self._class_numbers = {category.id: number for number, category in enumerate(self.categories, start=1)}
        self.reset()

    def reset(self) -> None:
        """Forget all results, to start a new evaluation on the same annotations."""
        self._found: dict[Any, _Found] = {}
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def update(self, results: Iterable[dict[str, Any]], image_ids: Iterable[Any]) -> None:
        """Add the results of some images.

        Args:
            results: entries in COCO's result format (``Instances.to_coco``); the part that ``metric`` does not
                measure is ignored, and so is an entry without the part it does.
            image_ids: every image that was looked at, those without results too. One that was added before (samplers
                pad the last batch of several processes with repetitions) is not counted twice.

        Raises:
            ValueError: an image that the annotations, or ``image_ids``, do not contain.
        """
        new: dict[Any, list[dict[str, Any]]] = {}
        known = set()
        for image_id in image_ids:
            if image_id not in self.truth.image_numbers:
                raise ValueError(f"image id {image_id!r} is not in the annotations")
            known.add(image_id)
            if image_id not in self._found:
                new[image_id] = []
        for entry in results:
            if entry["image_id"] in new:
                new[entry["image_id"]].append(entry)
            elif entry["image_id"] not in known:
                raise ValueError(f"a result belongs to image id {entry['image_id']!r}, which is not in image_ids")
        for image_id, entries in new.items():
            self._found[image_id] = self._pack(entries)
        self._arrays = None

    def state(self) -> dict[Any, Any]:
        """Everything added so far, small enough to send to another process; see ``merge``."""
        return {image_id: tuple(found) for image_id, found in self._found.items()}

    def merge(self, state: dict[Any, Any]) -> None:
        """Add what another process has collected; an image that is already here is not counted twice."""
        for image_id, found in state.items():
            self._found.setdefault(image_id, _Found(*found))
        self._arrays = None

    def compute(self) -> dict[str, float]:
        """The figures by name, and ``AP/<class>`` for every class. -1 is COCO's "no such object in the data".

        For keypoints also ``PCK@0.1``, see ``mvision.evaluation.pck``.
        """
        figures = {figure.name: self._figure(figure) for figure in FIGURES[self.name]}
        main = FIGURES[self.name][0]
        for index, category in enumerate(self.categories):
            figures[f"AP/{category.name}"] = self._figure(main, index)
        if self.name == "keypoints":
            figures[f"PCK@{FRACTION}"] = self._pck()
        return figures

    def table(self) -> str:
        """COCO's table and one line per class, for a terminal."""
        lines = []
        for figure in FIGURES[self.name]:
            title = "Average Precision (AP)" if figure.kind == "precision" else "Average Recall    (AR)"
            iou = "0.50:0.95" if figure.iou is None else f"{figure.iou:.2f}     "
            overlap = "OKS" if self.name == "keypoints" else "IoU"
            where = f"{overlap}={iou} | area={figure.area:>6} | maxDets={figure.detections:>3}"
            lines.append(f"{title} @[ {where} ] = {_shown(self._figure(figure))}")
        if self.name == "keypoints":
            where = f"{FRACTION:.2f} of the box's longer side | maxDets={MOST_RESULTS:>3}"
            lines.append(f" Correct Keypoints (PCK) @[ {where} ] = {_shown(self._pck())}")
        lines += ["", *self._class_table()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _pck(self) -> float:
        """Share of the labelled points of all images seen that were found, -1 if there are none."""
        objects = self.truth.by_image()
        correct = total = 0
        for image_id, found in self._found.items():
            of_image = objects.get(self.truth.image_numbers[image_id], [])
            hits, labelled = correct_points(of_image, found.rows[:, 4], found.rows[:, 5], found.shapes)
            correct, total = correct + hits, total + labelled
        return correct / total if total else -1.0

    def _class_table(self) -> list[str]:
        counts = self.truth.counts(self._found)
        width = max([5, *(len(category.name) for category in self.categories)])
        columns = [FIGURES[self.name][i] for i in (0, 1, 2)]
        columns.append(next(f for f in FIGURES[self.name] if f.name in ("AR100", "AR")))
        lines = [f"{'class':<{width}}  objects  " + "  ".join(f"{figure.name:>5}" for figure in columns)]
        for index, category in enumerate(self.categories):
            cells = "  ".join(f"{_shown(self._figure(figure, index)):>5}" for figure in columns)
            lines.append(f"{category.name:<{width}}  {counts[index]:>7}  {cells}")
        return lines

    def _pack(self, entries: list[dict[str, Any]]) -> _Found:
        part = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[self.name]
        entries = [e for e in entries if e["category_id"] in self._class_numbers and e.get(part) is not None]
        rows = np.zeros((len(entries), 6))
        rows[:, 4] = [entry["score"] for entry in entries]
        rows[:, 5] = [self._class_numbers[entry["category_id"]] for entry in entries]
        if self.name != "bbox":
            return _Found(rows, [entry[part] for entry in entries])
        if entries:
            rows[:, :4] = [entry["bbox"] for entry in entries]
        return _Found(rows, [])

    def _figure(self, figure: Figure, index: int | None = None) -> float:
        """Mean over the settings that have objects, as COCO takes it; of one class where ``index`` is given."""
        precision, recall = self._evaluated()
        kind = "keypoints" if self.name == "keypoints" else "bbox"
        values = precision if figure.kind == "precision" else recall
        if figure.iou is not None:
            values = values[[int(np.abs(_IOUS - figure.iou).argmin())]]
        values = values[..., _AREAS[kind].index(figure.area), _DETECTIONS[kind].index(figure.detections)]
        if index is not None:
            values = values[..., index]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    def _evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall of all settings, classes in the order of ``categories``."""
        if self._arrays is not None:
            return self._arrays
        kind = "keypoints" if self.name == "keypoints" else "bbox"
        shape = (len(_IOUS), len(self.categories), len(_AREAS[kind]), len(_DETECTIONS[kind]))
        recall = np.full(shape, -1.0)
        precision = np.full((shape[0], 101, *shape[1:]), -1.0)
        if self._found:
            run = _run_hotcoco if self._backend == "hotcoco" else _run_pycocotools
            images = sorted(self.truth.image_numbers[image_id] for image_id in self._found)
            for classes, sigmas in self.truth.groups:
                truth = self.truth.dataset(set(classes))
                part = run(truth, self._results(set(classes)), self.name, images, classes, sigmas)
                indices = [number - 1 for number in classes]
                precision[:, :, indices], recall[:, indices] = part
        self._arrays = precision, recall
        return self._arrays

    def _results(self, classes: set[int]) -> np.ndarray | list[dict[str, Any]]:
        """(n, 7) image, x, y, w, h, score, class for boxes, else COCO entries with nothing but their mask or points.

        Without a box beside them the evaluators take a result's area from its mask or points, as COCO's format has it.
        """
        numbers = self.truth.image_numbers
        ordered = sorted((numbers[image_id], found) for image_id, found in self._found.items())
        if self.name == "bbox":
            parts = [np.insert(found.rows, 0, number, axis=1) for number, found in ordered]
            return np.concatenate(parts)
        part = "segmentation" if self.name == "segm" else "keypoints"
        return [
            {"image_id": number, "category_id": int(row[5]), "score": float(row[4]), part: shape}
            for number, found in ordered
            for row, shape in zip(found.rows, found.shapes)
            if int(row[5]) in classes
        ]


class BoxMetric(CocoMetric):
    """AP of boxes."""

    name = "bbox"


class MaskMetric(CocoMetric):
    """AP of masks. An object that is labelled with a box alone is a region where nothing counts."""

    name = "segm"


class KeypointMetric(CocoMetric):
    """AP of keypoints by OKS, and PCK. An object without labelled points is a region where nothing counts."""

    name = "keypoints"


def _has_hotcoco() -> bool:
    try:
        import hotcoco  # noqa: F401
    except ImportError:
        return False
    return True


def _run_hotcoco(
    truth: dict[str, Any],
    results: np.ndarray | list[dict[str, Any]],
    metric: str,
    images: list[int],
    classes: list[int],
    sigmas: list[float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCO, COCOeval

    data = COCO(truth)
    evaluator = COCOeval(data, data.load_res(results), metric)
    params = evaluator.params
    params.img_ids, params.cat_ids = images, classes
    if sigmas is not None:
        params.kpt_oks_sigmas = sigmas
    evaluator.params = params
    evaluator.evaluate()
    evaluator.accumulate()
    arrays = evaluator.eval
    assert arrays is not None
    return arrays["precision"], arrays["recall"]


def _run_pycocotools(
    truth: dict[str, Any],
    results: np.ndarray | list[dict[str, Any]],
    metric: str,
    images: list[int],
    classes: list[int],
    sigmas: list[float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints at every step
        data = COCO()
        data.dataset = truth
        data.createIndex()
        if len(results):
            found = data.loadRes(results)
        else:  # loadRes looks at the first result
            found = COCO()
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(data, found, metric)
        evaluator.params.imgIds, evaluator.params.catIds = images, classes
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = np.asarray(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _shown(value: float) -> str:
    return "  -  " if value < 0 else f"{value:.3f}"
