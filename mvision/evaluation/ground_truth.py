"""The annotations as COCO's evaluators need them: renumbered, and limited to the model's classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.oks import describe_default_sigmas, keypoint_sigmas


class GroundTruth:
    """Ground truth: images numbered 1..I in the order of their ids, classes 1..C in the order of ``categories``.

    New numbers free the evaluators from ids that they cannot take: text, negative numbers, and an annotation with id 0,
    which pycocotools reads as "not matched".

    Attributes:
        image_numbers: the data's image id -> number.
        groups: class numbers that are evaluated together, with the sigmas of their keypoints (one group unless the
            classes have different numbers of keypoints).
        in_data: the numbers of the classes that the data has.
        notes: what a reader of the figures should know.
    """

    def __init__(
        self,
        coco_dict: dict[str, Any],
        categories: Sequence[Category],
        metric: str,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Renumber.

        Args:
            coco_dict: complete and clean, as ``mvision.data.CocoSplit.coco_dict`` is: every annotation has ``bbox``
                (xywh), ``area`` and ``iscrowd``, every image its size.
            categories: the model's classes.
            metric: ``bbox``, ``segm`` (annotations without ``segmentation`` are regions where nothing counts) or
                ``keypoints`` (every annotation has ``keypoints``).
            sigmas: of the keypoints; None: see ``CocoMetric``.

        Raises:
            UserError: no class in common, or classes with another number of keypoints than in the data.
        """
        self.metric = metric
        self.notes: list[str] = []
        self._categories = list(categories)
        records = {image["id"]: image for image in coco_dict["images"]}
        self.image_numbers = {image_id: number for number, image_id in enumerate(sorted(records), start=1)}
        self._images = [
            {"id": number, "width": records[image_id]["width"], "height": records[image_id]["height"]}
            for image_id, number in self.image_numbers.items()
        ]
        self._classes: list[dict[str, Any]] = [
            {"id": number, "name": c.name} for number, c in enumerate(categories, start=1)
        ]
        numbers = self._match_classes(coco_dict["categories"], coco_dict["annotations"])
        self.in_data = frozenset(numbers.values())
        self._point_orders = self._match_points(coco_dict["categories"], numbers) if metric == "keypoints" else {}
        self._annotations = [
            self._renumbered(annotation, number, numbers[annotation["category_id"]], records[annotation["image_id"]])
            for number, annotation in enumerate(
                (a for a in coco_dict["annotations"] if a["category_id"] in numbers), start=1
            )
        ]
        self.groups = self._groups(coco_dict["categories"], sigmas)

    def dataset(self, classes: set[int]) -> dict[str, Any]:
        """A COCO dictionary of these classes that an evaluator may write into."""
        return {
            "images": self._images,
            "categories": [c for c in self._classes if c["id"] in classes],
            "annotations": [dict(a) for a in self._annotations if a["category_id"] in classes],
        }

    def classes_of_objects(self) -> np.ndarray:
        """(annotations + 1,) int64: the index of the class by the number of the annotation, which begins at 1."""
        classes = np.zeros(1 + max((a["id"] for a in self._annotations), default=0), dtype=np.int64)
        for annotation in self._annotations:
            classes[annotation["id"]] = annotation["category_id"] - 1
        return classes

    def by_image(self) -> dict[int, list[dict[str, Any]]]:
        """Objects by the number of their image, no crowds; images without any are missing."""
        objects: dict[int, list[dict[str, Any]]] = {}
        for annotation in self._annotations:
            if not annotation["iscrowd"]:
                objects.setdefault(annotation["image_id"], []).append(annotation)
        return objects

    def most_objects(self) -> tuple[int, str]:
        """The largest number of objects of one class in one image that the figures count, and the class's name."""
        counts = Counter((a["image_id"], a["category_id"]) for a in self._annotations if _is_counted(a))
        if not counts:
            return 0, ""
        (_, class_number), most = counts.most_common(1)[0]
        return most, self._categories[class_number - 1].name

    def counts(self, image_ids: Iterable[Any]) -> list[int]:
        """Objects of each class in these images that the figures count (no crowds, none without labelled points)."""
        images = {self.image_numbers[image_id] for image_id in image_ids}
        counts = Counter(a["category_id"] for a in self._annotations if a["image_id"] in images and _is_counted(a))
        return [counts[c["id"]] for c in self._classes]

    def _match_classes(self, in_data: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[Any, int]:
        """The data's category id -> class number, by name."""
        numbers = {c["name"]: c["id"] for c in self._classes}
        matched = {c["id"]: numbers[c["name"]] for c in in_data if c["name"] in numbers}
        if in_data and not matched:
            ours, theirs = (", ".join(str(c["name"]) for c in side[:5]) for side in (self._classes, in_data))
            raise UserError(
                f"the model's classes ({ours}) and the data's ({theirs}) have no name in common: choose other --data"
            )
        used = {a["category_id"] for a in annotations}
        unknown = [str(c["name"]) for c in in_data if c["id"] in used and c["id"] not in matched]
        if unknown:
            self.notes.append(f"not evaluated, because the model does not find them: {', '.join(unknown)}")
        return matched

    def _match_points(self, in_data: list[dict[str, Any]], numbers: dict[Any, int]) -> dict[int, list[int]]:
        """Class number -> for each keypoint of the model, its position in the data; for classes that differ in it.

        Points are matched by name. Where one side has points that the other has not, but as many of them, they are
        taken in their order, with a note.
        """
        orders = {}
        for entry in in_data:
            number = numbers.get(entry["id"])
            theirs = entry.get("keypoints") or []
            ours = self._categories[number - 1].keypoints if number is not None else []
            if number is None or theirs == ours or len(theirs) != len(ours):
                continue
            if set(theirs) == set(ours):
                orders[number] = [theirs.index(name) for name in ours]
                continue
            differing = [f"'{a}' for '{b}'" for a, b in zip(theirs, ours) if a != b]
            self.notes.append(
                f"keypoints of '{entry['name']}' have other names in the data than in the model and are compared in "
                f"their order: {', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}"
            )
        return orders

    def _renumbered(
        self, annotation: dict[str, Any], number: int, class_number: int, image: dict[str, Any]
    ) -> dict[str, Any]:
        """What the evaluators read of an annotation, and nothing else."""
        entry: dict[str, Any] = {
            "id": number,
            "image_id": self.image_numbers[annotation["image_id"]],
            "category_id": class_number,
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": annotation["iscrowd"],
        }
        if self.metric == "segm":
            segmentation = annotation.get("segmentation")
            entry["segmentation"] = _encode(segmentation or _corners(annotation["bbox"]), image)
            entry["iscrowd"] = entry["iscrowd"] if segmentation else 1
        if self.metric == "keypoints":
            category = self._categories[class_number - 1]
            points = annotation["keypoints"] or [0] * (3 * len(category.keypoints))  # none: a class without points here
            if len(points) != 3 * len(category.keypoints):
                raise UserError(
                    f"annotation {annotation['id']}: {len(points) // 3} keypoints, but class '{category.name}' of the "
                    f"model has {len(category.keypoints)}"
                )
            if class_number in self._point_orders:
                points = [value for at in self._point_orders[class_number] for value in points[3 * at : 3 * at + 3]]
            entry |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        return entry

    def _groups(
        self, in_data: list[dict[str, Any]], sigmas: Sequence[float] | None
    ) -> list[tuple[list[int], list[float] | None]]:
        if self.metric != "keypoints":
            return [([c["id"] for c in self._classes], None)]
        own = {c["name"]: self._in_our_order(c) for c in in_data}
        by_sigmas: dict[tuple[float, ...], list[int]] = {}
        for number, category in enumerate(self._categories, start=1):
            if category.keypoints:
                given = sigmas if sigmas is not None else category.sigmas or own.get(category.name)
                by_sigmas.setdefault(self._sigmas(category, given), []).append(number)
        if not by_sigmas:
            raise UserError("no class of this data has keypoints: nothing to evaluate")
        return [(group, list(values)) for values, group in by_sigmas.items()]

    def _in_our_order(self, in_data: dict[str, Any]) -> list[float] | None:
        """The sigmas that a class has in the data, in the order of the model's keypoints."""
        sigmas = in_data.get("keypoint_sigmas")
        numbers = [number for number, c in enumerate(self._categories, start=1) if c.name == in_data["name"]]
        order = self._point_orders.get(numbers[0]) if numbers else None
        return sigmas if not sigmas or order is None else [sigmas[at] for at in order]

    def _sigmas(self, category: Category, given: Sequence[float] | None) -> tuple[float, ...]:
        count = len(category.keypoints)
        if given is not None and len(given) == count:
            return tuple(float(value) for value in given)
        if given is not None and len({len(c.keypoints) for c in self._categories} - {0}) == 1:
            raise UserError(f"{len(given)} keypoint sigmas given, class '{category.name}' has {count} points")
        unknown = category.model_copy(update={"sigmas": []})
        if (line := describe_default_sigmas(unknown)) is not None:
            self.notes.append(line)
        return keypoint_sigmas(unknown, count)


def _is_counted(annotation: dict[str, Any]) -> bool:
    """No crowd region, and with labelled points where keypoints are evaluated."""
    return not annotation["iscrowd"] and annotation.get("num_keypoints") != 0


def _encode(segmentation: Any, image: dict[str, Any]) -> dict[str, Any]:
    """Polygons as one compressed mask; compressed run lengths as they are."""
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, image["height"], image["width"]))


def _corners(box: Sequence[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]
