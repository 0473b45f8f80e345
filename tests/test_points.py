"""Tolerances, left and right of keypoints, from the annotations to the model's categories and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvision.data import CocoSplit, find_layout
from mvision.data.augment.geometry import mirror_keypoints
from mvision.data.tools.convert import convert
from mvision.errors import UserError
from mvision.evaluation import KeypointMetric
from mvision.structures import Category
from tests.coco_files import annotation, coco, write_set

LEGS = ["front_a", "front_b", "tail"]
DOG: dict[str, Any] = {"id": 3, "name": "dog", "keypoints": LEGS}
TUBE: dict[str, Any] = {"id": 7, "name": "tube", "keypoints": ["top", "end"]}


def read(root: Path, categories: list[dict[str, Any]], info: dict[str, Any] | None = None) -> CocoSplit:
    points = [10, 10, 2, 20, 12, 2, 15, 15, 1]
    tree = coco([annotation(keypoints=points[: 3 * len(categories[0]["keypoints"])])], categories)
    write_set(root, tree | ({} if info is None else {"info": info}))
    return CocoSplit(find_layout(root).split("train"), ("boxes", "keypoints"))


def test_sigmas_of_a_category_win_over_those_of_info(tmp_path: Path) -> None:
    info = {"keypoint_sigmas": [0.1, 0.2, 0.3]}
    dog, tube = read(tmp_path / "a", [DOG, {**TUBE, "sigmas": [0.5, 0.5]}], info).categories
    assert (dog.sigmas, tube.sigmas) == ([0.1, 0.2, 0.3], [0.5, 0.5])
    assert read(tmp_path / "b", [{**DOG, "keypoint_sigmas": [1, 2, 3]}], info).categories[0].sigmas == [1, 2, 3]
    assert read(tmp_path / "c", [DOG]).categories[0].sigmas == []


def test_the_evaluator_takes_the_same_sigmas(tmp_path: Path) -> None:
    split = read(tmp_path, [{**DOG, "sigmas": [0.1, 0.2, 0.3]}])
    assert KeypointMetric(split.coco_dict, split.categories).ground_truth.groups == [([1], [0.1, 0.2, 0.3])]
    # A model that knows none, such as one that was trained elsewhere: those of the data it is evaluated on.
    plain = [Category(id=3, name="dog", keypoints=LEGS)]
    assert KeypointMetric(split.coco_dict, plain).ground_truth.groups == [([1], [0.1, 0.2, 0.3])]


def test_flip_pairs_replace_names(tmp_path: Path) -> None:
    own = read(tmp_path / "a", [{**DOG, "flip_pairs": [["front_a", "front_b"]]}]).categories
    assert own[0].flip_pairs == [(0, 1)]
    np.testing.assert_array_equal(mirror_keypoints(own), [[1, 0, 2]])
    shared = read(tmp_path / "b", [DOG, TUBE], {"flip_pairs": [["top", "end"]]}).categories
    np.testing.assert_array_equal(mirror_keypoints(shared), [[0, 1, 2], [1, 0, 2]])
    none = Category(id=1, name="eyes", keypoints=["left_eye", "right_eye"], flip_pairs=[])
    np.testing.assert_array_equal(mirror_keypoints([none]), [[0, 1]])


def test_conversion_keeps_what_is_known_about_points(tmp_path: Path) -> None:
    dog = {**DOG, "sigmas": [0.1, 0.2, 0.3], "flip_pairs": [["front_b", "front_a"]], "skeleton": [[1, 3]]}
    before = read(tmp_path / "a", [dog]).categories
    layout = convert(find_layout(tmp_path / "a"), tmp_path / "b")
    assert CocoSplit(layout.split("train"), ("boxes", "keypoints")).categories == before


@pytest.mark.parametrize(
    ("category", "info", "message"),
    [
        ({"sigmas": [0.1, 0.2]}, {}, "sigmas of category 'dog': 2 sigmas for 3 keypoints"),
        ({"keypoint_sigmas": [0.1, 0.2, -1]}, {}, "keypoint_sigmas of category 'dog': sigma -1.0 is not above 0"),
        ({"sigmas": 0.1}, {}, "sigmas of category 'dog' has to be a list of numbers.*not 0.1"),
        ({}, {"keypoint_sigmas": [0.1] * 4}, "info.keypoint_sigmas has 4 numbers.*'dog' 3"),
        ({}, {"keypoint_sigmas": [0.1, "x", 1]}, "info.keypoint_sigmas has to be a list of numbers"),
        ({"flip_pairs": [["front_a", "front_c"]]}, {}, "of category 'dog': no keypoint is called 'front_c'.*front_b"),
        ({}, {"flip_pairs": [["front_a", "nose"]]}, "info.flip_pairs: no keypoint is called 'nose'"),
        ({"flip_pairs": ["front_a"]}, {}, "has to be a list of pairs"),
        ({"flip_pairs": [["front_a", "front_b"], ["tail", "front_a"]]}, {}, "'front_a' occurs twice"),
    ],
)
def test_mistakes_are_one_line_with_file_and_category(
    category: dict[str, Any], info: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, [{**DOG, **category}], info)
    assert str(tmp_path / "annotations" / "train.json") in str(caught.value)
    assert "\n" not in str(caught.value)
