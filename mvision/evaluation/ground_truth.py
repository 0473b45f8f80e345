"""The annotations as the COCO evaluators need them: numbered anew, complete, and limited to the model's classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS, DEFAULT_SIGMA, keypoint_sigmas


class Truth:
    """Ground truth: images numbered 1..I in the order of their ids, classes 1..C in the order of ``categories``.

    Numbering anew frees the evaluators from ids that they cannot take: text, negative numbers, and an annotation with
    id 0, which pycocotools reads as "not matched".

    Attributes:
        image_numbers: the data's image id -> number.
        groups: class numbers that are evaluated together, with the sigmas of their keypoints (one group unless the
            classes have different numbers of keypoints).
        notes: what a reader of the figures should know.
    """

    def __init__(
        self,
        coco_dict: dict[str, Any],
        categories: Sequence[Category],
        metric: str,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.metric = metric
        self.notes: list[str] = []
        records = {image["id"]: image for image in coco_dict["images"]}
        self.image_numbers = {image_id: number for number, image_id in enumerate(sorted(records), start=1)}
        self._images = [
            {"id": number, "width": records[image_id].get("width", 0), "height": records[image_id].get("height", 0)}
            for image_id, number in self.image_numbers.items()
        ]
        self._classes: list[dict[str, Any]] = [
            {"id": number, "name": c.name} for number, c in enumerate(categories, start=1)
        ]
        annotations = [a for a in coco_dict.get("annotations", []) if a["image_id"] in records]
        numbers = self._match_classes(coco_dict.get("categories", []), annotations)
        annotations = [a for a in annotations if a["category_id"] in numbers]
        self._points = [len(category.keypoints) for category in categories]
        for annotation in annotations:
            number = numbers[annotation["category_id"]]
            self._points[number - 1] = self._points[number - 1] or len(annotation.get("keypoints") or []) // 3
        complete = [self._complete(a, numbers[a["category_id"]], records[a["image_id"]]) for a in annotations]
        self._annotations = [{"id": i, **a} for i, a in enumerate((a for a in complete if a is not None), start=1)]
        if dropped := len(complete) - len(self._annotations):
            self.notes.append(f"{dropped} annotations have neither box, mask nor labelled points: not evaluated")
        self.groups = self._groups(categories, coco_dict, sigmas)

    def dataset(self, classes: set[int]) -> dict[str, Any]:
        """A COCO dictionary of these classes that an evaluator may write into."""
        return {
            "images": self._images,
            "categories": [c for c in self._classes if c["id"] in classes],
            "annotations": [dict(a) for a in self._annotations if a["category_id"] in classes],
        }

    def by_image(self) -> dict[int, list[dict[str, Any]]]:
        """Objects by the number of their image, no crowds; images without any are missing."""
        found: dict[int, list[dict[str, Any]]] = {}
        for annotation in self._annotations:
            if not annotation["iscrowd"]:
                found.setdefault(annotation["image_id"], []).append(annotation)
        return found

    def counts(self, image_ids: Iterable[Any]) -> list[int]:
        """Objects of each class in these images that the figures count (no crowds, none without labelled points)."""
        images = {self.image_numbers[image_id] for image_id in image_ids}
        counts = Counter(
            a["category_id"]
            for a in self._annotations
            if a["image_id"] in images and not a["iscrowd"] and a.get("num_keypoints") != 0
        )
        return [counts[c["id"]] for c in self._classes]

    def _match_classes(self, in_data: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[Any, int]:
        """The data's category id -> class number, by name."""
        numbers = {c["name"]: c["id"] for c in self._classes}
        matched = {c["id"]: numbers[c["name"]] for c in in_data if c["name"] in numbers}
        if in_data and not matched:
            ours, theirs = (", ".join(str(c["name"]) for c in side[:5]) for side in (self._classes, in_data))
            raise UserError(f"the model's classes ({ours}) and the data's ({theirs}) have no name in common")
        used = {a["category_id"] for a in annotations}
        unknown = [str(c["name"]) for c in in_data if c["id"] in used and c["id"] not in matched]
        if unknown:
            self.notes.append(f"not evaluated, because the model does not find them: {', '.join(unknown)}")
        return matched

    def _complete(self, annotation: dict[str, Any], number: int, image: dict[str, Any]) -> dict[str, Any] | None:
        """One annotation with everything that the evaluators read and nothing else; None if it has no geometry."""
        box, area = annotation.get("bbox"), annotation.get("area")
        points = annotation.get("keypoints")
        rle = None
        if self.metric == "segm" or area is None or not box:
            rle = _encode(annotation.get("segmentation"), image)
        if not box:
            box = coco_mask.toBbox(rle).tolist() if rle else _enclosing_box(points)
        if box is None:
            return None
        if area is None:
            area = coco_mask.area(rle) if rle else box[2] * box[3]
        complete: dict[str, Any] = {
            "image_id": self.image_numbers[annotation["image_id"]],
            "category_id": number,
            "bbox": [float(v) for v in box],
            "area": float(area),
            "iscrowd": int(annotation.get("iscrowd") or 0),
        }
        if self.metric == "segm":
            complete["segmentation"] = rle or _encode(_corners(box), image)
            complete["iscrowd"] = complete["iscrowd"] if rle else 1
        if self.metric == "keypoints":
            count = self._points[number - 1]
            points = points or [0] * (3 * count)
            if len(points) != 3 * count:
                raise UserError(
                    f"annotation {annotation.get('id')}: keypoints has {len(points)} numbers, class "
                    f"'{self._classes[number - 1]['name']}' has {count} points, which is {3 * count} numbers"
                )
            complete |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        return complete

    def _groups(
        self, categories: Sequence[Category], coco_dict: dict[str, Any], sigmas: Sequence[float] | None
    ) -> list[tuple[list[int], list[float] | None]]:
        numbers = [c["id"] for c in self._classes]
        if self.metric != "keypoints":
            return [(numbers, None)]
        own = {c["name"]: c.get("keypoint_sigmas") for c in coco_dict.get("categories", [])}
        of_all = (coco_dict.get("info") or {}).get("keypoint_sigmas")
        by_sigmas: dict[tuple[float, ...], list[int]] = {}
        for number, category, count in zip(numbers, categories, self._points):
            if count:
                given = sigmas if sigmas is not None else category.sigmas or own.get(category.name) or of_all
                by_sigmas.setdefault(self._sigmas(category, count, given), []).append(number)
        if not by_sigmas:
            raise UserError("no class of this data has keypoints: nothing to evaluate")
        return [(group, list(values)) for values, group in by_sigmas.items()]

    def _sigmas(self, category: Category, count: int, given: Sequence[float] | None) -> tuple[float, ...]:
        if given is not None and len(given) == count:
            return tuple(float(value) for value in given)
        if given is not None and len(set(self._points) - {0}) == 1:
            raise UserError(f"{len(given)} keypoint sigmas given, class '{category.name}' has {count} points")
        if category.keypoints != list(COCO_SIGMAS):
            self.notes.append(
                f"OKS of '{category.name}' uses sigma {DEFAULT_SIGMA} (the mean of COCO's) for every point; "
                "better ones go into info.keypoint_sigmas of the annotations"
            )
        return keypoint_sigmas(category.model_copy(update={"sigmas": []}), count)


def _encode(segmentation: Any, image: dict[str, Any]) -> dict[str, Any] | None:
    """COCO's polygons or run lengths (compressed or not) as one compressed mask; None if there is none."""
    if not segmentation or not image.get("height") or not image.get("width"):
        return None
    height, width = int(image["height"]), int(image["width"])
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(segmentation, height, width)
        return segmentation
    # A polygon of two points is taken for a box by frPyObjects.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None


def _corners(box: Sequence[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _enclosing_box(points: Sequence[float] | None) -> list[float] | None:
    """xywh around the labelled keypoints, None without any."""
    labelled = np.reshape(points if points is not None else [], (-1, 3))
    labelled = labelled[labelled[:, 2] > 0]
    if not len(labelled):
        return None
    low, high = labelled[:, :2].min(axis=0), labelled[:, :2].max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]
