"""The built-in data set: reproducible, sound as COCO files, hard and varied enough."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from mvision.builtin import (
    CATEGORY_IDS,
    drawing,
    ensure_builtin,
    generate_builtin,
    generate_image,
    scene,
)
from mvision.builtin.annotate import encode_crowd, encode_keypoints, encode_mask
from mvision.builtin.backdrop import Backdrop
from mvision.builtin.canvas import Shape, overlap, paste, render
from mvision.builtin.geometry import box, ellipse
from mvision.builtin.person import person
from mvision.builtin.scene import MIN_VISIBLE_AREA
from mvision.builtin.skeleton import KEYPOINTS, sample_skeleton

LIGHT = (0.0, -1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_builtin(tmp_path_factory.mktemp("cache"), train=110, val=10, seed=3)


@pytest.fixture(scope="module")
def coco(folder: Path) -> COCO:
    return COCO(str(folder / "annotations" / "train.json"))


def _annotations(coco: COCO, name: str | None = None) -> list[dict]:
    items = [a for a in coco.dataset["annotations"] if not a["iscrowd"]]
    return items if name is None else [a for a in items if a["category_id"] == CATEGORY_IDS[name]]


# --- reproducible


def test_image_depends_on_its_arguments_alone():
    image, annotations = generate_image(0, 5, "train")
    generate_image(7, 1, "val")
    again, annotations_again = generate_image(0, 5, "train")
    np.testing.assert_array_equal(image, again)
    assert annotations == annotations_again
    for other in ((1, 5, "train"), (0, 6, "train"), (0, 5, "val")):
        changed, _ = generate_image(*other)
        assert changed.shape != image.shape or (changed != image).any()


def test_files_are_the_same_whatever_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "_WORTH_A_PROCESS", 4)
    starts = []
    monkeypatch.setattr(drawing, "_start", lambda *args, start=drawing._start: starts.append(1) or start(*args))
    contents = []
    for cores in (1, 3):
        monkeypatch.setattr(drawing, "cores", lambda cores=cores: cores)
        target = tmp_path / str(cores)
        target.mkdir()
        generate_builtin(target, train=9, val=4, seed=1)
        contents.append({p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()})
    assert len(starts) == 3
    assert contents[0] == contents[1]
    assert len(contents[0]) == 9 + 4 + 3  # images, two annotation files, the stamp


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('no room')", "exit code 1: no room"),
        ("print('{', flush=True, end='')", "exit code 0"),
        ("import no_such_library", "exit code 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os; os.kill(os.getpid(), 15)", "killed by SIGTERM"),
    ],
)
def test_processes_that_die_cost_time_only_and_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
):
    monkeypatch.setattr(drawing, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(drawing, "cores", lambda: 2)
    monkeypatch.setattr(drawing, "_WORKER", program)
    said: list[str] = []
    folder = ensure_builtin(tmp_path, train=2, val=1, log=said.append)
    assert len(list((folder / "images").iterdir())) == 3
    (line,) = said
    assert line.startswith(f"warning: 2 of 2 drawing processes could not be started or ended early ({reason}): ")
    assert line.endswith(" of 3 pictures are drawn in one process")


def test_processes_that_cannot_be_started_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(drawing, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(drawing, "cores", lambda: 2)
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-such-python"))
    assert ensure_builtin(tmp_path, train=3, val=0).is_dir()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "2 of 2 drawing processes could not be started or ended early (not started: No such file" in printed


def test_one_process_that_dies_leaves_its_picture_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The others go on, and take what the dead one would have drawn later."""
    program = "import sys; from mvision.builtin import drawing as d; draw = d.draw; "
    program += "d.draw = lambda folder, seed, job: 1 / 0 if job == ('train', 5) else draw(folder, seed, job); "
    monkeypatch.setattr(drawing, "_WORKER", f"{program} d.work(*sys.argv[1:])")
    monkeypatch.setattr(drawing, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(drawing, "cores", lambda: 3)
    said: list[str] = []
    drawn: list[drawing.Job] = []
    draw = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *a: drawn.append(a[2]) or draw(*a))
    folder = ensure_builtin(tmp_path, train=20, val=1, log=said.append)
    assert len(list((folder / "images").iterdir())) == 21
    assert drawn == [("train", 5)]
    assert said == [
        "warning: 1 of 3 drawing processes could not be started or ended early (exit code 1: ZeroDivisionError: "
        "division by zero); 1 of 21 pictures were drawn in their place, the others by the rest"
    ]


def test_what_is_drawn_has_not_changed():
    """Another picture or label needs another `store.VERSION`: figures of the built-in set are compared over years.

    With a margin: versions of OpenCV differ in single bits.
    """
    expected = [
        (124.47, 39.99, 4, 3843.0),
        (147.29, 43.6, 5, 7349.0),
        (125.42, 49.22, 9, 16797.0),
        (90.52, 54.23, 7, 24769.0),
    ]
    for index, (mean, deviation, objects, area) in enumerate(expected):
        image, annotations = generate_image(0, index, "train")
        assert image.mean() == pytest.approx(mean, abs=0.02)
        assert image.std() == pytest.approx(deviation, abs=0.02)
        assert len(annotations) == objects
        assert sum(a["area"] for a in annotations) == pytest.approx(area, rel=1e-3)


# --- sound as COCO


def test_layout_and_categories(folder: Path):
    train, val = (json.loads((folder / "annotations" / f"{s}.json").read_text()) for s in ("train", "val"))
    assert (len(train["images"]), len(val["images"])) == (110, 10)
    for split in (train, val):
        assert split["info"]["seed"] == 3
        assert split["info"]["version"]
        ids = [c["id"] for c in split["categories"]]
        assert len(set(ids)) == 8
        assert max(ids) > len(ids)  # gaps, so that nobody takes ids for indices
        names = {c["name"]: c for c in split["categories"]}
        assert names["person"]["keypoints"] == list(KEYPOINTS)
        assert np.array(names["person"]["skeleton"]).shape == (19, 2)
        assert {k for edge in names["person"]["skeleton"] for k in edge} == set(range(1, 18))
        assert "keypoints" not in names["car"]
        for image in split["images"]:
            pixels = cv2.imread(str(folder / "images" / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3)
    for key in ("images", "annotations"):
        ids = [item["id"] for item in train[key] + val[key]]
        assert len(set(ids)) == len(ids)


def test_boxes_and_areas_are_those_of_the_masks(coco: COCO):
    kinds: Counter[str] = Counter()
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        mask = coco.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == annotation["area"]
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)
        assert x >= 0
        assert y >= 0
        assert x + w <= image["width"]
        assert y + h <= image["height"]
        kinds["polygon" if isinstance(annotation["segmentation"], list) else "rle"] += 1
    assert min(kinds["polygon"], kinds["rle"]) > 20  # both forms are exercised


def test_masks_of_one_image_do_not_overlap_by_more_than_their_rims(coco: COCO):
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(a).astype(bool) for a in coco.imgToAnns[image_id]]
        for i, first in enumerate(masks):
            for second in masks[:i]:
                assert (first & second).sum() <= 0.12 * min(first.sum(), second.sum()) + 12


def test_keypoints_of_people(coco: COCO):
    for annotation in _annotations(coco):
        if annotation["category_id"] != CATEGORY_IDS["person"]:
            assert "keypoints" not in annotation
            continue
        image = coco.imgs[annotation["image_id"]]
        x, y, v = np.array(annotation["keypoints"], float).reshape(17, 3).T
        assert annotation["num_keypoints"] == (v > 0).sum()
        assert set(v) <= {0, 1, 2}
        assert (x[v == 0] == 0).all()
        assert (y[v == 0] == 0).all()
        assert ((x >= 0) & (x < image["width"]) & (y >= 0) & (y < image["height"])).all()
        mask = cv2.dilate(coco.annToMask(annotation), np.ones((5, 5), np.uint8))
        assert mask[y[v == 2].astype(int), x[v == 2].astype(int)].all()  # what is visible lies on the mask


def test_crowd_regions_are_uncompressed_run_lengths():
    for index in range(400):
        image, annotations = generate_image(0, index, "crowds")
        crowds = [a for a in annotations if a["iscrowd"]]
        if crowds:
            break
    (crowd,) = crowds
    assert all(isinstance(c, int) for c in crowd["segmentation"]["counts"])
    rle = mask_utils.frPyObjects(crowd["segmentation"], *image.shape[:2])
    assert mask_utils.area(rle) == crowd["area"]
    assert crowd.get("num_keypoints", 0) == 0


# --- hard and varied enough


def test_variety(coco: COCO):
    items = _annotations(coco)
    classes = Counter(coco.cats[a["category_id"]]["name"] for a in items)
    assert set(classes) == set(CATEGORY_IDS)
    assert max(classes, key=lambda name: classes[name]) == "person"
    assert min(classes.values()) >= 12
    per_image = [sum(not a["iscrowd"] for a in coco.imgToAnns[i]) for i in coco.getImgIds()]
    assert min(per_image) == 0
    assert 2.5 < np.mean(per_image) < 6
    assert max(per_image) <= 12
    people = Counter(a["image_id"] for a in _annotations(coco, "person"))
    assert max(people.values()) >= 5
    shapes = {(i["height"] > i["width"]) - (i["height"] < i["width"]) for i in coco.dataset["images"]}
    assert shapes == {-1, 0, 1}  # landscape, square and portrait


def test_scale_and_occlusion(coco: COCO):
    areas = np.array([a["area"] for a in _annotations(coco)])
    assert areas.min() >= 0.9 * MIN_VISIBLE_AREA
    assert 0.2 < (areas < 32**2).mean() < 0.6
    assert (areas > 96**2).any()
    v = np.array([a["keypoints"] for a in _annotations(coco, "person")]).reshape(-1, 3)[:, 2]
    assert 0.02 < (v == 0).mean() < 0.2
    assert 0.1 < (v == 1).mean() < 0.4


def test_no_class_can_be_told_by_its_colour(coco: COCO, folder: Path):
    """Mean colours of each class spread over the whole range."""
    colours: dict[str, list[np.ndarray]] = {}
    for annotation in _annotations(coco):
        image = cv2.imread(str(folder / "images" / coco.imgs[annotation["image_id"]]["file_name"]))
        name = coco.cats[annotation["category_id"]]["name"]
        colours.setdefault(name, []).append(image[coco.annToMask(annotation) > 0].mean(axis=0))
    for name, means in colours.items():
        assert np.std(means, axis=0).min() > 20, name


# --- left and right, visible and hidden


def test_left_and_right_follow_from_where_the_figure_faces():
    counts = Counter()
    for seed in range(200):
        skeleton = sample_skeleton(np.random.default_rng(seed))
        joints = skeleton.joints
        facing = skeleton.side[0]  # the figure's own left, seen from the viewer: > 0 when it faces us
        ears = joints["left_ear"][0] - joints["right_ear"][0]
        assert np.sign(ears) == np.sign(facing)
        trunk = joints["left_hip"][0] - joints["right_hip"][0]
        counts[bool(trunk > 0)] += 1
        for part in ("knee", "ankle", "elbow", "wrist"):
            assert f"left_{part}" in joints
    assert counts[True] > counts[False] > 20  # most figures face the viewer, some turn their backs


def test_figure_from_behind_hides_its_face():
    shown: dict[str, list[bool]] = {"front": [], "back": []}
    for seed in range(120):
        figure = person(np.random.default_rng(seed))
        visible = figure.visible(render(figure.shapes, 200, (150, 150), LIGHT))
        facing = sample_skeleton(np.random.default_rng(seed)).forward[2]  # the skeleton is the first thing drawn
        if facing < -0.3:
            shown["back"].append(bool(visible[:3].any()))
        elif facing > 0.6:
            shown["front"].append(bool(visible[:3].all()))
    assert len(shown["back"]) > 10
    assert not any(shown["back"])
    assert np.mean(shown["front"]) > 0.8  # now and then an arm is in the way


def test_limbs_keep_their_length_or_look_shorter():
    """A bone is never longer in the picture than in space: keypoints belong to one rigid skeleton."""
    for seed in range(50):
        joints = sample_skeleton(np.random.default_rng(seed)).joints
        for side in ("left", "right"):
            upper = joints[f"{side}_elbow"] - joints[f"{side}_shoulder"]
            assert np.linalg.norm(upper) == pytest.approx(0.16)
            assert np.linalg.norm(upper[:2]) <= 0.16 + 1e-9


def test_nearly_hidden_objects_are_left_out_and_the_rest_is_visible():
    """A tile in front hides 7/10 of the next one, which hides 8/10 of the third: that one is not drawn at all."""
    rng = np.random.default_rng(0)
    stage = scene._Stage(rng, Backdrop(np.zeros((100, 100, 3), np.uint8), "table", None), LIGHT)
    tile = [Shape(box(0, 0, 1, 1), (1, 2, 3))]
    for x, depth, size, category in ((50, 3, 20, "ball"), (56, 2, 20, "car"), (60, 1, 20, "dog"), (90, 0, 6, "mug")):
        stage.items.append(scene._Item(render(tile, size, (x, 50), LIGHT), depth, category))
    shown = {item.category: int(visible.sum()) for item, visible in scene._resolve_occlusion(stage)}
    assert shown == {"ball": 400, "car": 120}  # and the mug has 36 pixels only


def test_keypoint_flags():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:15] = True
    points = np.array([[10, 10], [10, 10], [25, 10], [-1, 10], [10, 20.0]])
    values, count = encode_keypoints(points, np.array([True, False, True, True, True]), mask)
    assert np.array(values).reshape(-1, 3).tolist() == [[10, 10, 2], [10, 10, 1], [25, 10, 1], [0, 0, 0], [0, 0, 0]]
    assert count == 3


# --- drawing and encoding


def test_render_puts_an_object_where_it_is_asked_to():
    sprite = render([Shape(box(0, 0, 4, 2), (200, 100, 50))], 40, (30, 25), LIGHT)
    image = np.zeros((60, 60, 3), np.uint8)
    paste(image, sprite)
    expected = np.zeros((60, 60), np.uint8)
    expected[15:35, 10:50] = 1  # continuous coordinates: the box spans 10..50, so pixels 10 to 49
    window, part = overlap((60, 60), sprite)
    found = np.zeros_like(expected)
    found[window] = sprite.mask[part]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(image[25, 30], (200, 100, 50), atol=3)
    np.testing.assert_allclose(sprite.to_image(np.array([[0.0, 0], [4, 2]])), [[10, 15], [50, 35]])
    turned = render([Shape(box(0, 0, 4, 2), (200, 100, 50))], 40, (30, 25), LIGHT, angle=90)
    assert turned.mask.sum() == pytest.approx(800, rel=0.1)
    np.testing.assert_allclose(turned.to_image(np.array([[0.0, 0]])), [[40, 5]], atol=1e-6)  # clockwise


def test_sprite_outside_of_the_image_is_no_error():
    sprite = render([Shape(ellipse(0, 0, 1), (9, 9, 9))], 10, (-30, 5), LIGHT)
    assert overlap((20, 20), sprite)[1] is None
    image = np.full((20, 20, 3), 77, np.uint8)
    paste(image, sprite)
    assert (image == 77).all()


def test_mask_with_a_hole_or_two_parts_is_run_length_coded():
    mask = np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    segmentation, bbox, area = encode_mask(mask)
    assert isinstance(segmentation, list)
    assert bbox == [5, 5, 25, 25]
    assert area == 625
    ring, pair = mask.copy(), mask.copy()
    ring[12:20, 12:20] = False
    pair[35:38, 35:38] = True
    for shape in (ring, pair):
        segmentation, _, area = encode_mask(shape)
        assert isinstance(segmentation, dict)
        assert area == shape.sum()
        np.testing.assert_array_equal(mask_utils.decode({**segmentation, "counts": segmentation["counts"]}), shape)


@pytest.mark.parametrize("corner", [0, 3])
def test_crowd_run_lengths_start_with_the_zeros(corner: int):
    mask = np.zeros((6, 7), bool)
    mask[corner : corner + 2, corner : corner + 3] = True
    segmentation, _, area = encode_crowd(mask)
    np.testing.assert_array_equal(mask_utils.decode(mask_utils.frPyObjects(segmentation, 6, 7)), mask)
    assert area == 6
