"""The pictures in a run's folder: validation images with predictions, and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.loading.dataset import Dataset
from mvision.engine import report
from mvision.engine.report import plot_run, write_prediction_grid
from mvision.structures import Instances
from tests.coco_files import annotation, coco, write_set
from tests.fake_model import CATEGORIES, SIZE, FakeModel, paint

CLASSES = [{"id": 20, "name": "unknown to the model"}, *({"id": c.id, "name": c.name} for c in CATEGORIES)]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().eval()


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, Instances, Instances]]:
    """The images, ground truths and predictions that were drawn side by side."""
    drawn: list[tuple[np.ndarray, Instances, Instances]] = []
    draw = report.side_by_side

    def record(image: np.ndarray, gt: Instances, pred: Instances) -> np.ndarray:
        drawn.append((image, gt, pred))
        return draw(image, gt, pred)

    monkeypatch.setattr(report, "side_by_side", record)
    return drawn


def dataset_in(root: Path, damaged: tuple[int, ...] = (), images: int = 4) -> Dataset:
    """Image n.jpg has a red rectangle at x = 5 n, and a label of a class that the model does not have."""
    entries = []
    for number in range(1, images + 1):
        box = [5.0 * number, 20.0, 40.0, 30.0]
        entries += [annotation(number, box, CATEGORIES[0].id), annotation(number, [0.0, 0.0, 9.0, 9.0], 20)]
    tree = coco(entries, CLASSES, images, SIZE)
    for entry in tree["images"]:
        entry["file_name"] = f"{entry['id']}.jpg"
    write_set(root, tree, pictures=False)
    for number in range(1, images + 1):
        picture = paint(SIZE, [(0, (5 * number, 20, 5 * number + 40, 50))])
        data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
        (root / "images" / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number in damaged else data)
    return Dataset(CocoSplit(find_layout(root).split("train"), ("boxes",)))


def test_ground_truth_beside_the_prediction_of_the_same_image(
    model: FakeModel, tmp_path: Path, pairs: list[tuple[np.ndarray, Instances, Instances]]
) -> None:
    messages: list[str] = []
    write_prediction_grid(model, dataset_in(tmp_path), tmp_path / "grid.jpg", count=3, log=messages.append)
    assert messages == []
    assert len(pairs) == 3
    for number, (image, gt, pred) in enumerate(pairs, start=1):
        assert image[35, 5 * number + 20, 0] > 200
        assert [gt.names[label] for label in gt.labels] == ["red"]  # not the class that the model does not have
        np.testing.assert_allclose(gt.boxes, [[5 * number, 20, 5 * number + 40, 50]], atol=0.01)
        np.testing.assert_allclose(pred.boxes, gt.boxes, atol=2)
    picture = cv2.imread(str(tmp_path / "grid.jpg"))
    assert picture is not None
    assert picture.shape[1] > 2 * 640


def test_predictions_below_the_threshold_are_left_out(
    model: FakeModel, tmp_path: Path, pairs: list[tuple[np.ndarray, Instances, Instances]]
) -> None:
    dataset = dataset_in(tmp_path, images=1)
    for threshold in (0.7, 0.98):  # the score is about 0.9
        write_prediction_grid(model, dataset, tmp_path / "grid.jpg", threshold=threshold)
    assert [len(pred) for _, _, pred in pairs] == [1, 0]


@pytest.mark.parametrize(
    ("damaged", "count", "message"),
    [
        ((2,), 2, "leaves out 1 of 3"),
        ((1, 3), 8, "leaves out 2 of 4"),
        ((4,), 2, None),
        ((4,), 4, "leaves out 1 of 4"),
    ],
)
def test_damaged_images_are_left_out_and_named(
    model: FakeModel,
    tmp_path: Path,
    pairs: list[tuple[np.ndarray, Instances, Instances]],
    damaged: tuple[int, ...],
    count: int,
    message: str | None,
) -> None:
    messages: list[str] = []
    dataset = dataset_in(tmp_path, damaged)
    write_prediction_grid(model, dataset, tmp_path / "predictions.jpg", count, log=messages.append)
    readable = [number for number in range(1, 5) if number not in damaged][:count]
    assert [Path(str(gt.path)).name for _, gt, _ in pairs] == [f"{number}.jpg" for number in readable]
    assert cv2.imread(str(tmp_path / "predictions.jpg")) is not None
    if message is None:
        assert messages == []
    else:
        (text,) = messages
        assert text.startswith(f"predictions.jpg {message} validation images that cannot be read or drawn: ")
        assert [f"{number}.jpg" in text for number in range(1, 5)] == [number in damaged for number in range(1, 5)]


def test_without_a_readable_image_there_is_no_picture(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = dataset_in(tmp_path, damaged=(1, 2, 3, 4, 5), images=5)
    write_prediction_grid(model, dataset, tmp_path / "predictions.jpg")
    assert not (tmp_path / "predictions.jpg").exists()
    text = capsys.readouterr().out
    assert text.startswith("no predictions.jpg: 5 of 5 validation images that cannot be read or drawn: ")
    assert text.endswith("), ...\n")
    assert "3.jpg (" in text
    assert "4.jpg" not in text


def test_an_image_that_cannot_be_drawn_costs_itself_alone(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of 70,000 x 1 pixels, which has no row left when it is made smaller."""
    draw, messages = report.side_by_side, []  # type: ignore[var-annotated]

    def side_by_side(image: np.ndarray, gt: Instances, pred: Instances) -> np.ndarray:
        image = np.zeros((1, 70000, 3), np.uint8) if str(gt.path).endswith("2.jpg") else image
        return draw(image, gt, pred)

    monkeypatch.setattr(report, "side_by_side", side_by_side)
    write_prediction_grid(model, dataset_in(tmp_path), tmp_path / "predictions.jpg", log=messages.append)
    assert len(messages) == 1
    assert messages[0].startswith("predictions.jpg leaves out 1 of 4 validation images that cannot be read or drawn: ")
    assert "2.jpg (" in messages[0]
    assert cv2.imread(str(tmp_path / "predictions.jpg")) is not None


def test_no_sheet_of_an_earlier_time_stays(model: FakeModel, tmp_path: Path) -> None:
    (tmp_path / "predictions.jpg").write_bytes(b"of other weights")
    write_prediction_grid(model, dataset_in(tmp_path, damaged=(1, 2, 3, 4)), tmp_path / "predictions.jpg")
    assert not (tmp_path / "predictions.jpg").exists()


RECORDS: list[dict[str, Any]] = [
    {"epoch": 0, "loss": {"boxes": 2.0, "classes": 1.0}},
    {"epoch": 1, "loss": {"boxes": 1.0, "classes": 0.5}, "metrics": {"detection": {"AP": 0.25, "AP50": 0.5}}},
]


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def record(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    plot_run(RECORDS, tmp_path / "results.png")
    assert cv2.imread(str(tmp_path / "results.png")) is not None
    losses, scores = figures[0].axes
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in [*losses.lines, *scores.lines]}
    assert curves == {
        "boxes": [[1, 2], [2, 1]],
        "classes": [[1, 1], [2, 0.5]],
        "detection AP": [[2, 0.25]],
        "detection AP50": [[2, 0.5]],
    }


def test_curves_of_a_run_without_evaluation(tmp_path: Path) -> None:
    plot_run(RECORDS[:1], tmp_path / "results.png")
    assert cv2.imread(str(tmp_path / "results.png")) is not None


def test_a_full_disk_leaves_the_former_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot_run(RECORDS[:1], tmp_path / "results.png")
    before = (tmp_path / "results.png").read_bytes()

    def fail(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plot_run(RECORDS, tmp_path / "results.png")
    assert [file.name for file in tmp_path.iterdir()] == ["results.png"]
    assert (tmp_path / "results.png").read_bytes() == before
