"""COCO's average precision of boxes, masks and keypoints: the official figures, and AP for every class.

The figures are those of pycocotools (Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and the evaluation
described at cocodataset.org/#detection-eval): at most 100 results per image and class (20 for keypoints), crowd regions
ignored. Where an image has more objects of a class than that, no model could find them all, and as many results count
as there are objects; a note beside the figures says so. hotcoco computes them if it is installed, the same digits in a
fraction of the time; else pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from mvision.errors import printable
from mvision.evaluation.ground_truth import GroundTruth
from mvision.evaluation.metric import Metric
from mvision.evaluation.pck import FRACTION, correct_points
from mvision.evaluation.tables import figure_text, text_table
from mvision.structures import Category

IOUS = np.linspace(0.5, 0.95, 10)
Results = np.ndarray | list[dict[str, Any]]


class Figure(NamedTuple):
    """One line of COCO's table: a mean over the settings that it does not fix.

    Attributes:
        iou: the threshold of IoU (for keypoints of OKS) from which a result matches an object; None: all of ``IOUS``.
        area: which objects count, by their area.
        max_results: the number of results per image and class that count; None: the metric's largest number.
    """

    name: str
    kind: Literal["precision", "recall"]
    iou: float | None
    area: str
    max_results: int | None


_BOX_FIGURES = (
    Figure("AP", "precision", None, "all", None),
    Figure("AP50", "precision", 0.5, "all", None),
    Figure("AP75", "precision", 0.75, "all", None),
    Figure("AP_small", "precision", None, "small", None),
    Figure("AP_medium", "precision", None, "medium", None),
    Figure("AP_large", "precision", None, "large", None),
    Figure("AR1", "recall", None, "all", 1),
    Figure("AR10", "recall", None, "all", 10),
    Figure("AR100", "recall", None, "all", 100),
    Figure("AR_small", "recall", None, "small", None),
    Figure("AR_medium", "recall", None, "medium", None),
    Figure("AR_large", "recall", None, "large", None),
)
_KEYPOINT_FIGURES = (
    Figure("AP", "precision", None, "all", None),
    Figure("AP50", "precision", 0.5, "all", None),
    Figure("AP75", "precision", 0.75, "all", None),
    Figure("AP_medium", "precision", None, "medium", None),
    Figure("AP_large", "precision", None, "large", None),
    Figure("AR", "recall", None, "all", None),
    Figure("AR50", "recall", 0.5, "all", None),
    Figure("AR75", "recall", 0.75, "all", None),
    Figure("AR_medium", "recall", None, "medium", None),
    Figure("AR_large", "recall", None, "large", None),
)


class ImageResults(NamedTuple):
    """The results of one image: (n, 6) float64 of x, y, w, h, score, class number, and n masks or lists of points."""

    rows: np.ndarray
    shapes: list[Any]


class CocoMetric(Metric):
    """COCO's figures; ``BoxMetric``, ``MaskMetric`` and ``KeypointMetric`` fix what is compared.

    Args:
        annotations: in COCO's format and complete, as ``mvision.data.CocoSplit.coco_dict`` is.
        categories: the model's classes, matched with the data's by name. Classes that only one of them has are not
            evaluated.
        sigmas: per-keypoint standard deviations of the OKS as fractions of the object's scale. None takes, in this
            order: those of ``categories`` (which the model was trained with), those of the data's categories, COCO's
            or CrowdPose's for their points, and else one value for all points, with a note.
        backend: ``hotcoco`` or ``pycocotools``; None takes hotcoco if it is installed.

    Class attributes:
        key: of the part of a result that is compared; results without it are ignored.
        similarity: how the overlap with an object is measured: IoU or OKS.
        figures: the lines of COCO's table.
        areas, max_results: the axes of the evaluator's arrays, in its order. Where the data has more objects of a
            class in one image than the last of ``max_results``, their number is appended in the instance.

    Raises:
        UserError: none of the model's classes is in the data, or the annotations cannot be evaluated.
    """

    key: ClassVar[str]
    similarity: ClassVar[str] = "IoU"
    figures: ClassVar[tuple[Figure, ...]] = _BOX_FIGURES
    areas: ClassVar[tuple[str, ...]] = ("all", "small", "medium", "large")
    max_results: tuple[int, ...] = (1, 10, 100)

    def __init__(
        self,
        annotations: dict[str, Any],
        categories: Sequence[Category],
        sigmas: Sequence[float] | None = None,
        backend: Literal["hotcoco", "pycocotools"] | None = None,
    ) -> None:
        super().__init__(annotations, categories)
        self.ground_truth = GroundTruth(annotations, self.categories, self.name, sigmas)
        self.notes = self.ground_truth.notes
        most, name = self.ground_truth.most_objects()
        if most > self.max_results[-1]:
            self.notes.append(
                f"an image has {most} objects of class '{name}': {most} results per image and class count for AP, "
                f"where COCO's limit of {self.max_results[-1]} would leave objects out"
            )
            self.max_results = (*self.max_results, most)
        self._backend = backend or ("hotcoco" if find_spec("hotcoco") else "pycocotools")
        self._class_numbers = {category.id: number for number, category in enumerate(self.categories, start=1)}

    def measure(self, image_id: Any, results: list[dict[str, Any]]) -> ImageResults:
        """The results of the evaluated classes, in a compact form."""
        if image_id not in self.ground_truth.image_numbers:
            raise ValueError(f"image id {image_id!r} is not in the annotations")
        results = [e for e in results if e["category_id"] in self._class_numbers and e.get(self.key) is not None]
        rows = np.zeros((len(results), 6))
        rows[:, 4] = [entry["score"] for entry in results]
        rows[:, 5] = [self._class_numbers[entry["category_id"]] for entry in results]
        if results:
            # Masks and points may come without a box: then each is in a place of its own.
            nowhere = ((-1.0 - place, 0.0, 0.0, 0.0) for place in range(len(results)))
            rows[:, :4] = [entry.get("bbox", other) for entry, other in zip(results, nowhere)]
        return ImageResults(rows, [] if self.key == "bbox" else [entry[self.key] for entry in results])

    def compute(self) -> dict[str, float]:
        """The figures of COCO's table by name, and ``AP/<class>`` for every class; -1 as in COCO's table."""
        figures = {figure.name: self._value(figure) for figure in self.figures}
        for index, category in enumerate(self.categories):
            figures[f"AP/{category.name}"] = self._value(self.figures[0], index)
        return figures

    def table(self) -> str:
        """COCO's table and one line per class, for a terminal."""
        return "\n".join(
            [*self._summary(), "", *self._class_table(), *(printable(f"note: {note}") for note in self.notes)]
        )

    def _summary(self) -> list[str]:
        lines = []
        for figure in self.figures:
            title = "Average Precision (AP)" if figure.kind == "precision" else "Average Recall    (AR)"
            iou = "0.50:0.95" if figure.iou is None else f"{figure.iou:.2f}     "
            settings = f"{self.similarity}={iou} | area={figure.area:>6} | maxDets={self._results_of(figure):>3}"
            lines.append(f"{title} @[ {settings} ] = {figure_text(self._value(figure)):>5}")
        return lines

    def _class_table(self) -> list[str]:
        counts = self.ground_truth.counts(self.measured)
        columns = [figure for figure in self.figures if figure.name in ("AP", "AP50", "AP75", "AR100", "AR")]
        rows = [["class", "objects", *(figure.name for figure in columns)]]
        for index, category in enumerate(self.categories):
            values = (figure_text(self._value(figure, index)) for figure in columns)
            rows.append([category.name, str(counts[index]), *values])
        return text_table(rows)

    def _value(self, figure: Figure, index: int | None = None) -> float:
        """A figure over all classes, or of the class at ``index``: the mean over all settings that have objects."""
        precision, recall = self._arrays()
        values = precision if figure.kind == "precision" else recall
        if figure.iou is not None:
            values = values[[int(np.abs(IOUS - figure.iou).argmin())]]
        values = values[..., self.areas.index(figure.area), self.max_results.index(self._results_of(figure))]
        if index is not None:
            values = values[..., index]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    def _results_of(self, figure: Figure) -> int:
        return self.max_results[-1] if figure.max_results is None else figure.max_results

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision (IoU, recall threshold, class, area, max_results) and recall (the same without its threshold)."""
        if self._computed is None:
            shape = (len(IOUS), len(self.categories), len(self.areas), len(self.max_results))
            recall = np.full(shape, -1.0)
            precision = np.full((shape[0], 101, *shape[1:]), -1.0)
            images = sorted(self.ground_truth.image_numbers[image_id] for image_id in self.measured)
            for classes, sigmas in self.ground_truth.groups if images else []:
                with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
                    arrays = self._evaluate(images, classes, sigmas)
                indices = [number - 1 for number in classes]
                precision[:, :, indices], recall[:, indices] = arrays["precision"], arrays["recall"]
            self._computed = precision, recall
        return self._computed

    def _evaluate(self, images: list[int], classes: list[int], sigmas: list[float] | None) -> dict[str, np.ndarray]:
        """The evaluator's arrays, with the classes in the order of ``classes``."""
        evaluator = self.new_evaluator(self._results(set(classes)), images, classes, sigmas)
        evaluator.params.maxDets = list(self.max_results)
        evaluator.evaluate()
        evaluator.accumulate()
        return evaluator.eval

    def new_evaluator(
        self,
        results: Results,
        images: list[int],
        classes: list[int],
        sigmas: list[float] | None,
        as_one: bool = False,
    ) -> Any:
        """COCO's evaluator of some results, not yet run; images and classes by their numbers in ``ground_truth``.

        With ``as_one`` the objects of all these classes get the first one's number, which the results have to have too.
        (The evaluators' own setting for that, ``useCats``, compares no poses in pycocotools.)
        """
        new_evaluator = _hotcoco_evaluator if self._backend == "hotcoco" else _pycocotools_evaluator
        gt = self.ground_truth.dataset(set(classes))
        if as_one:
            gt["annotations"] = [{**entry, "category_id": classes[0]} for entry in gt["annotations"]]
        evaluator = new_evaluator(gt, results, self.name)
        params = evaluator.params
        params.imgIds, params.catIds = images, classes[:1] if as_one else classes
        if sigmas is not None:
            params.kpt_oks_sigmas = np.asarray(sigmas)
        return evaluator

    def precision_at(self, iou: float) -> np.ndarray:
        """(101, classes) precision at the recalls 0, 0.01, ..., 1, as AP is computed from it; -1 without objects."""
        precision, _ = self._arrays()
        return precision[int(np.abs(IOUS - iou).argmin()), :, :, self.areas.index("all"), -1]

    def _results(self, classes: set[int]) -> Results:
        """All results of some classes, for the evaluator.

        (n, 7) image, x, y, w, h, score, class for boxes; else COCO entries with a mask or points and without a box,
        because the evaluators then compute a result's area from these, as COCO's format demands.
        """
        numbers = self.ground_truth.image_numbers
        ordered = sorted((numbers[image_id], results) for image_id, results in self.measured.items())
        if self.key == "bbox":
            return np.concatenate([np.insert(results.rows, 0, number, axis=1) for number, results in ordered])
        return [
            {"image_id": number, "category_id": int(row[5]), "score": float(row[4]), self.key: shape}
            for number, results in ordered
            for row, shape in zip(results.rows, results.shapes)
            if int(row[5]) in classes
        ]


class BoxMetric(CocoMetric):
    """AP of boxes."""

    name = "bbox"
    key = "bbox"


class MaskMetric(CocoMetric):
    """AP of masks. An object that is labelled with a box only is treated as a crowd region: it is ignored."""

    name = "segm"
    key = "segmentation"


class KeypointMetric(CocoMetric):
    """AP of keypoints by OKS, and PCK (see ``mvision.evaluation.pck``). Objects without labelled points are ignored."""

    name = "keypoints"
    key = "keypoints"
    similarity = "OKS"
    figures = _KEYPOINT_FIGURES
    areas = ("all", "medium", "large")
    max_results = (20,)

    def compute(self) -> dict[str, float]:
        """COCO's figures, and ``PCK@0.1``."""
        return {**super().compute(), f"PCK@{FRACTION}": self._pck()}

    def _summary(self) -> list[str]:
        settings = f"{FRACTION:.2f} of the box's longer side | maxDets={self.max_results[-1]:>3}"
        return [*super()._summary(), f" Correct Keypoints (PCK) @[ {settings} ] = {figure_text(self._pck()):>5}"]

    def _pck(self) -> float:
        """Share of the labelled points in the measured images that are predicted correctly; -1 if there are none."""
        objects = self.ground_truth.by_image()
        correct = total = 0
        for image_id, (rows, points) in self.measured.items():
            of_image = objects.get(self.ground_truth.image_numbers[image_id], [])
            hits, labelled = correct_points(of_image, rows[:, 4], rows[:, 5], points, self.max_results[-1])
            correct, total = correct + hits, total + labelled
        return correct / total if total else -1.0


def _hotcoco_evaluator(gt: dict[str, Any], results: Results, metric: str) -> Any:
    from hotcoco import COCO, COCOeval

    data = COCO(gt)
    return COCOeval(data, data.loadRes(results), metric)


def _pycocotools_evaluator(gt: dict[str, Any], results: Results, metric: str) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = COCO()
    data.dataset = gt
    data.createIndex()
    if len(results):
        predicted = data.loadRes(results)
    else:  # loadRes fails without a first result
        predicted = COCO()
        predicted.dataset = {**gt, "annotations": []}
        predicted.createIndex()
    return COCOeval(data, predicted, metric)
