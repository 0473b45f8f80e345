"""COCO's figures: against pycocotools used directly, on random data with everything that real data has."""

import contextlib
import copy
import io
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mvision.errors import UserError
from mvision.evaluation import BoxMetric, CocoMetric, KeypointMetric, MaskMetric
from mvision.structures import Category
from mvision.structures.oks import COCO_SIGMAS

BACKENDS = ["pycocotools", "hotcoco"]
POINTS = list(COCO_SIGMAS)
NAMES = {3: "cat", 7: "dog", 8: "bird", 90: "never seen"}
CATEGORIES = [Category(id=i, name=n, keypoints=POINTS) for i, n in NAMES.items()]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
    return request.param


def random_mask(box: list[float], size: tuple[int, int]) -> dict:
    x, y, w, h = box
    polygon = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
    return coco_mask.merge(coco_mask.frPyObjects([polygon], *size))


def random_data(seed: int = 0, images: int = 12) -> tuple[dict, list[dict]]:
    """Crowds, images without objects or without results, more than 100 results, ids with gaps, equal scores."""
    rng = np.random.default_rng(seed)
    sizes = {int(i): (int(rng.integers(200, 500)), int(rng.integers(200, 500))) for i in 10 + 7 * np.arange(images)}
    annotations: list[dict] = []
    results: list[dict] = []
    for number, (image_id, (height, width)) in enumerate(sizes.items()):
        for _ in range(0 if number == 3 else int(rng.integers(1, 12))):
            w, h = rng.uniform(8, 150, 2)
            box = [float(v) for v in (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h)]
            rle = random_mask(box, (height, width))
            points = np.column_stack((rng.uniform(box[0], box[0] + w, 17), rng.uniform(box[1], box[1] + h, 17)))
            visible = rng.integers(0, 3, 17) if rng.random() > 0.2 else np.zeros(17, int)
            annotation = {
                "id": len(annotations) + 5,
                "image_id": image_id,
                "category_id": int(rng.choice([3, 7, 8])),
                "bbox": box,
                "area": float(coco_mask.area(rle)),
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": rle,
                "keypoints": np.column_stack((points, visible)).ravel().tolist(),
                "num_keypoints": int((visible > 0).sum()),
            }
            annotations.append(annotation)
            if number == 4:
                continue
            for _ in range(int(rng.integers(0, 4))):
                jitter = rng.normal(0, 0.08, 4) * [w, h, w, h]
                found = np.maximum(np.array(box) + jitter, 1).tolist()
                shaken = points + rng.normal(0, 0.05, (17, 2)) * [w, h]
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": annotation["category_id"] if rng.random() > 0.1 else 90,
                        "bbox": found,
                        "score": round(float(rng.random()), 1),
                        "segmentation": random_mask(found, (height, width)),
                        "keypoints": np.column_stack((shaken, np.ones(17))).ravel().tolist(),
                    }
                )
    first = results[0]
    results += [{**first, "score": 0.05 + 1e-4 * i} for i in range(130)]
    coco_dict = {
        "images": [{"id": i, "height": h, "width": w, "file_name": f"{i}.jpg"} for i, (h, w) in sizes.items()],
        "annotations": annotations,
        "categories": [{"id": i, "name": n, "keypoints": POINTS} for i, n in NAMES.items()],
    }
    return coco_dict, results


def reference(coco_dict: dict, results: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """pycocotools as its own demo uses it: the stats, and AP of each class."""
    part = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[metric]
    results = [{k: r[k] for k in ("image_id", "category_id", "score", part)} for r in copy.deepcopy(results)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(coco_dict)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), metric)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    per_class = [p[p > -1].mean() if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)]
    return evaluator.stats, np.array(per_class)


METRICS = {"bbox": BoxMetric, "segm": MaskMetric, "keypoints": KeypointMetric}


def evaluated(coco_dict: dict, results: list[dict], backend: str, metric: str = "bbox", **options) -> CocoMetric:
    metric_object = METRICS[metric](coco_dict, CATEGORIES, backend=backend, **options)
    metric_object.update(results, [image["id"] for image in coco_dict["images"]])
    return metric_object


@pytest.mark.parametrize("metric", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_digits_as_pycocotools(metric: str, seed: int, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    coco_dict, results = random_data(seed)
    stats, per_class = reference(coco_dict, results, metric)
    figures = evaluated(coco_dict, results, backend, metric).compute()
    assert 0.05 < stats[0] < 0.95
    np.testing.assert_allclose([figures[f.name] for f in METRICS[metric].figures], stats, atol=1e-12)
    np.testing.assert_allclose([figures[f"AP/{name}"] for name in NAMES.values()], per_class, atol=1e-12)
    assert figures["AP/never seen"] == -1
    assert capfd.readouterr().out == ""


def test_no_results(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    coco_dict, _ = random_data()
    for metric in METRICS:
        figures = evaluated(coco_dict, [], backend, metric).compute()
        assert figures["AP"] == figures["AP/cat"] == 0
    assert capfd.readouterr().out == ""


def test_no_annotations(backend: str) -> None:
    coco_dict, results = random_data()
    coco_dict["annotations"] = []
    for found in (results, []):
        figures = evaluated(coco_dict, found, backend).compute()
        assert set(figures.values()) == {-1.0}


def test_no_images(backend: str) -> None:
    metric = BoxMetric({"images": [], "annotations": [], "categories": []}, CATEGORIES, backend=backend)
    assert set(metric.compute().values()) == {-1.0}
    assert metric.table().splitlines()[0].endswith("maxDets=100 ] =     -")


def test_objects_are_small_medium_or_large_by_their_area(backend: str) -> None:
    """By that of the annotation: a result has none of its own, so 40 x 40 is medium for it."""
    data = {"images": [{"id": 0, "height": 99, "width": 99}], "categories": [{"id": 3, "name": "cat"}]}
    for height, name in ((20, "AP_small"), (40, "AP_medium")):
        entry = {"id": 0, "image_id": 0, "category_id": 3, "bbox": [1, 2, 40, height]}
        data["annotations"] = [{**entry, "area": 40 * height, "iscrowd": 0}]
        result = {"image_id": 0, "category_id": 3, "bbox": [1, 2, 40, height], "score": 0.4}
        figures = evaluated(data, [result], backend).compute()
        assert figures[name] == figures["AP"] == pytest.approx(1)  # annotation and image have id 0: still matched
        assert min(figures["AP_small"], figures["AP_medium"]) == -1


def test_polygons_crowds_and_boxes_as_masks(backend: str) -> None:
    polygon = [[10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0]]
    image = {"id": 1, "height": 60, "width": 50}
    base = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}
    crowd = coco_mask.encode(np.asfortranarray(np.arange(50 * 60).reshape(50, 60).T >= 2400, dtype=np.uint8))
    annotations = [
        {**base, "id": 1, "segmentation": polygon},
        {**base, "id": 2, "segmentation": crowd, "category_id": 7, "iscrowd": 1},
        {**base, "id": 3, "category_id": 8},
    ]
    data = {
        "images": [image],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in NAMES.items()],
    }
    mask = np.zeros((60, 50), np.uint8)
    mask[10:40, 10:40] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    results = [{"image_id": 1, "category_id": c, "segmentation": rle, "score": 0.9} for c in (3, 7, 8)]
    metric = evaluated(data, results, backend, "segm")
    figures = metric.compute()
    assert figures["AP/cat"] == pytest.approx(1)
    assert figures["AP/dog"] == figures["AP/bird"] == -1  # a crowd, and an object without a mask: nothing counts there
    assert metric.ground_truth.counts([1]) == [1, 0, 0, 0]


def test_classes_meet_by_name(backend: str) -> None:
    coco_dict, results = random_data()
    expected = evaluated(coco_dict, results, backend).compute()
    shifted = {3: 30, 7: 70, 8: 80, 90: 900}
    for category in coco_dict["categories"]:
        category["id"] = shifted[category["id"]]
    for annotation in coco_dict["annotations"]:
        annotation["category_id"] = shifted[annotation["category_id"]]
    assert evaluated(coco_dict, results, backend).compute() == expected
    coco_dict["categories"][0]["name"] = "zebra"
    metric = evaluated(coco_dict, results, backend)
    assert metric.compute()["AP/cat"] == -1
    assert metric.compute()["AP/dog"] == expected["AP/dog"]
    assert any("zebra" in note for note in metric.notes)
    coco_dict["categories"] = [{"id": 30, "name": "zebra"}]
    with pytest.raises(UserError, match="zebra"):
        evaluated(coco_dict, results, backend)


def test_images_are_counted_once_and_only_when_seen(backend: str) -> None:
    coco_dict, results = random_data()
    ids = [image["id"] for image in coco_dict["images"]]
    whole = evaluated(coco_dict, results, backend)
    halves = [BoxMetric(coco_dict, CATEGORIES, backend=backend) for _ in range(2)]
    for half, seen in zip(halves, (ids[1::2] + ids[:1], ids[::2])):  # the first image in both
        found = [r for r in results if r["image_id"] in seen]
        half.update(found, seen)
        half.update(found, seen)
    assert halves[0].compute() != whole.compute()
    halves[0].merge(pickle.loads(pickle.dumps(halves[1].measured)))  # as it travels between processes
    assert halves[0].compute() == whole.compute()
    few = [i for i in ids if i in ids[:5]]
    subset = BoxMetric(coco_dict, CATEGORIES, backend=backend)
    subset.update([r for r in results if r["image_id"] in few], few)
    cut = {**coco_dict, "images": coco_dict["images"][:5]}
    cut["annotations"] = [a for a in coco_dict["annotations"] if a["image_id"] in few]
    expected = evaluated(cut, [r for r in results if r["image_id"] in few], backend)
    assert subset.compute() == expected.compute()
    subset.reset()
    assert subset.compute()["AP"] == -1


def test_results_of_unknown_images_are_refused() -> None:
    coco_dict, results = random_data()
    metric = BoxMetric(coco_dict, CATEGORIES)
    with pytest.raises(ValueError, match="999"):
        metric.update([], [999])
    with pytest.raises(ValueError, match="not in image_ids"):
        metric.update(results, [coco_dict["images"][1]["id"]])


def keypoint_data(count: int, names: list[str], shift: float) -> tuple[dict, list[dict], list[Category]]:
    points = np.column_stack((np.linspace(10, 90, count), np.linspace(20, 80, count), np.full(count, 2.0)))
    base = {"image_id": 1, "category_id": 1}
    data = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                **base,
                "id": 1,
                "bbox": [0, 0, 100, 100],
                "area": 10_000,
                "iscrowd": 0,
                "keypoints": points.ravel().tolist(),
            }
        ],
    }
    moved = (points + np.array([shift, 0, 0])).ravel().tolist()
    results = [{**base, "keypoints": moved, "score": 0.5}]
    return data, results, [Category(id=1, name="thing", keypoints=names)]


def test_sigmas_of_the_data_are_used(backend: str) -> None:
    """OKS = exp(-d^2 / (2 s^2 (2 sigma)^2)): 10 px at s = 100 and sigma 0.05 is exp(-0.5) = 0.607, so AP 0.3."""
    data, results, categories = keypoint_data(5, list("abcde"), 10)

    def ap(**options) -> tuple[float, list[str]]:
        metric = KeypointMetric(data, categories, backend=backend, **options)
        metric.update(results, [1])
        return metric.compute()["AP"], metric.notes

    assert ap(sigmas=[0.05] * 5)[0] == pytest.approx(0.3)
    value, notes = ap()
    assert value == pytest.approx(0.6)
    assert "info.keypoint_sigmas" in notes[0]
    data["categories"][0]["keypoint_sigmas"] = [0.05] * 5
    assert ap() == (pytest.approx(0.3), [])
    assert ap(sigmas=[0.5] * 5)[0] == pytest.approx(1)
    with pytest.raises(UserError, match="4 keypoint sigmas"):
        ap(sigmas=[0.5] * 4)


def test_classes_with_different_keypoints(backend: str) -> None:
    data, results, categories = keypoint_data(5, list("abcde"), 0)
    other, more, more_categories = keypoint_data(3, ["x", "y", "z"], 0)
    data["annotations"] += [{**other["annotations"][0], "category_id": 2}]
    data["categories"] += [{"id": 2, "name": "other"}, {"id": 3, "name": "plain"}]
    categories += [more_categories[0].model_copy(update={"id": 2, "name": "other"}), Category(id=3, name="plain")]
    metric = KeypointMetric(data, categories, backend=backend)
    metric.update([*results, {**more[0], "category_id": 2}], [1])
    figures = metric.compute()
    assert [figures[k] for k in ("AP", "AP/thing", "AP/other")] == pytest.approx([1, 1, 1])
    assert figures["AP/plain"] == -1
    data["annotations"][1]["keypoints"] = [1, 2, 2]
    with pytest.raises(UserError, match="1 keypoints, but class 'other' of the model has 3"):
        KeypointMetric(data, categories)
    with pytest.raises(UserError, match="no class"):
        KeypointMetric({**data, "annotations": []}, [Category(id=3, name="plain")])


def test_table(backend: str) -> None:
    coco_dict, results = random_data()
    metric = evaluated(coco_dict, results, backend)
    table = metric.table()
    figures = metric.compute()
    assert f"area=   all | maxDets=100 ] = {figures['AP']:.3f}" in table
    assert f"IoU=0.75      | area=   all | maxDets=100 ] = {figures['AP75']:.3f}" in table
    dog = next(line for line in table.splitlines() if line.startswith("dog"))
    objects = sum(a["category_id"] == 7 and not a["iscrowd"] for a in coco_dict["annotations"])
    assert dog.split()[1:3] == [str(objects), f"{figures['AP/dog']:.3f}"]


def test_the_class_table_has_the_main_figures() -> None:
    coco_dict, results = random_data()
    for name, columns in (("bbox", "AP AP50 AP75 AR100"), ("keypoints", "AP AP50 AP75 AR")):
        lines = evaluated(coco_dict, results, "pycocotools", name).table().splitlines()
        start = lines.index("") + 1
        assert lines[start].split() == ["class", "objects", *columns.split()]
        assert lines[start + 4].split() == ["never", "seen", "0", "-", "-", "-", "-"]


def test_figures_follow_what_is_added_later(backend: str) -> None:
    coco_dict, results = random_data()
    ids = [image["id"] for image in coco_dict["images"]]
    whole = evaluated(coco_dict, results, backend).compute()
    metric = BoxMetric(coco_dict, CATEGORIES, backend=backend)
    metric.update([r for r in results if r["image_id"] == ids[0]], ids[:1])
    assert metric.compute() != whole
    metric.update([r for r in results if r["image_id"] != ids[0]], ids[1:])
    assert metric.compute() == whole


def test_notes_stand_below_the_table() -> None:
    data, results, categories = keypoint_data(5, list("abcde"), 0)
    data["categories"].append({"id": 2, "name": "stranger"})
    data["annotations"].append({**data["annotations"][0], "category_id": 2})
    metric = KeypointMetric(data, categories)
    metric.update(results, [1])
    first, second = (line for line in metric.table().splitlines() if line.startswith("note: "))
    assert "stranger" in first
    assert "info.keypoint_sigmas" in second


def test_results_without_the_part_that_is_compared_are_ignored() -> None:
    coco_dict, results = random_data()
    bare = [{key: value for key, value in entry.items() if key != "segmentation"} for entry in results]
    ids = [image["id"] for image in coco_dict["images"]]
    metric = MaskMetric(coco_dict, CATEGORIES)
    metric.update(bare + [{**entry, "segmentation": None} for entry in bare], ids)
    assert metric.compute()["AP"] == 0
    foreign = BoxMetric(coco_dict, CATEGORIES[:1])
    foreign.update(results, ids)
    assert foreign.compute()["AP"] == pytest.approx(evaluated(coco_dict, results, "pycocotools").compute()["AP/cat"])
