"""The range of values of pictures with more than 8 bits: measured, said, used in training and prediction."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from mvision.config import Config, ModelConfig, load_config, parse_model_config
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.loading import pixel_range as module
from mvision.data.loading.dataset import Dataset
from mvision.data.loading.pixel_range import choose_pixel_range, count_oddities, range_of, used_values
from mvision.data.tools.check import check
from mvision.data.tools.show import contact_sheet
from mvision.engine import train as training
from mvision.errors import UserError
from mvision.inference.predict import predict_images
from mvision.structures.images import read_image
from tests.coco_files import annotation, coco, picture, write_set
from tests.fake_model import FakeModel

GREY = picture()[..., 0]


def deep_set(root: Path, values: np.ndarray, suffix: str = ".png", images: int = 2) -> Path:
    """A data set whose pictures have these values."""
    for split in ("train", "val"):
        tree = coco([annotation(n + 1, [8, 8, 20 + n, 16]) for n in range(images)], images=images)
        for entry in tree["images"]:
            entry["file_name"] = f"{split}-{entry['id']}{suffix}"
            (root / "images").mkdir(parents=True, exist_ok=True)
            if values.ndim == 3:
                cv2.imwrite(str(root / "images" / entry["file_name"]), values[..., ::-1])
            else:
                Image.fromarray(values).save(root / "images" / entry["file_name"])
        write_set(root, tree, split, pictures=False)
    return root


def train_split(root: Path) -> CocoSplit:
    return CocoSplit(find_layout(root).split("train"))


def measured(values: np.ndarray) -> tuple[float, float]:
    used = used_values(values)
    assert used is not None
    return range_of([used])


SPREAD = np.linspace(0, 1, 48 * 64).reshape(48, 64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((SPREAD * 1023).astype(np.uint16), (0, 1023)),
        ((SPREAD * 3900).astype(np.uint16), (0, 4095)),
        ((SPREAD * 16000).astype(np.uint16), (0, 16383)),
        ((SPREAD * 65535).astype(np.uint16), (0, 65535)),
        ((SPREAD * 255).astype(np.uint16), (0, 255)),
        (SPREAD.astype(np.float32), (0, 1)),
        ((SPREAD * 200).astype(np.float32), (0, 255)),
        (np.zeros((48, 64), np.uint16), (0, 1)),
        (np.full((48, 64), 9000, np.uint16), (0, 16383)),
        (np.full((48, 64), -2.5, np.float32), (-2.5, -1.5)),
    ],
)
def test_the_range_of_a_usual_sensor(values: np.ndarray, expected: tuple[float, float]) -> None:
    assert measured(values) == expected


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(29000, 31000, np.uint16), (-20, 120, np.float32), (1e6, 3e6, np.int32), (0.001, 0.002, np.float32)],
)
def test_values_with_an_offset_are_spread_over_all_shades(low: float, high: float, kind: type) -> None:
    """Thermal cameras, temperatures, large integers: the range is that of the values, a little wider."""
    found = measured((low + SPREAD * (high - low)).astype(kind))
    span = high - low
    assert low - 0.1 * span < found[0] <= low
    assert high <= found[1] < high + 0.1 * span


def test_a_few_hot_pixels_do_not_make_pictures_dark() -> None:
    values = (SPREAD * 4000).astype(np.uint16)
    values[0, :2] = 65535
    low, high = measured(values)
    assert low == 0
    assert 3900 < high < 4500


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("colour", [False, True])
def test_training_and_prediction_see_12_bits_as_8(tmp_path: Path, suffix: str, colour: bool) -> None:
    eight = picture() if colour else GREY
    root = deep_set(tmp_path, eight.astype(np.uint16) * 16, suffix)
    split, said = train_split(root), list[str]()
    chosen = choose_pixel_range(None, [split], said.append)
    assert chosen == (0, 4095)
    assert len(said) == 1
    assert "0..4095 becomes 0..255" in said[0]
    expected = eight if colour else np.stack([eight] * 3, axis=-1)
    assert np.abs(Dataset(split, pixel_range=chosen).image(0).astype(int) - expected).max() <= 1

    model = FakeModel()
    model.config = SimpleNamespace(**{**vars(model.config), "pixel_range": chosen})
    seen: list[np.ndarray] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy().copy()))
    file = str(root / "images" / f"train-1{suffix}")
    predict_images(model, [file])
    if not colour:
        predict_images(model, [Image.open(file)])  # type: ignore[list-item]
    predict_images(model, [eight.astype(np.uint16) * 16])  # type: ignore[list-item]
    assert all(abs(image.mean() - expected.mean()) < 3 for image in seen)
    assert len(seen) == (2 if colour else 3)


def test_a_run_measures_once_and_loads_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = deep_set(tmp_path / "data", GREY.astype(np.uint16) * 16)
    config = load_config(overrides={"data.root": str(root)})

    class Reached(Exception):
        pass

    def stop(*_: object, pixel_range: object, **__: object) -> None:
        raise Reached(pixel_range)

    monkeypatch.setattr(training, "build_train_loader", stop)
    with pytest.raises(Reached) as caught:
        training.train(config, output=tmp_path / "run", device="cpu")
    assert caught.value.args == ((0, 4095),)
    assert config.model.pixel_range == (0, 4095)  # which is what the weights are saved with


def test_eight_bits_are_left_alone_and_hardly_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    look = module.picture_header
    monkeypatch.setattr(module, "picture_header", lambda path: opened.append(path.name) or look(path))
    for suffix, files in ((".png", 2), (".jpg", 0), (".bmp", 0)):
        split = train_split(deep_set(tmp_path / suffix, picture(), suffix))
        assert choose_pixel_range(None, [split], lambda _: pytest.fail("nothing to say")) is None
        count_oddities(split)
        assert len(opened) == 2 * files
        opened.clear()
    eight = tmp_path / ".png" / "images" / "train-1.png"
    assert np.array_equal(read_image(eight, pixel_range=(1000.0, 2000.0)), read_image(eight))


def test_only_some_files_of_a_large_set_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADERS", 3)
    monkeypatch.setattr(module, "DECODED", 2)
    root = deep_set(tmp_path, GREY.astype(np.uint16) * 16, images=9)
    for name in ("train-1.png", "train-9.png"):
        Image.fromarray(np.full((48, 64), 65535, np.uint16)).save(root / "images" / name)
    read: list[str] = []
    values = module.read_values
    monkeypatch.setattr(module, "read_values", lambda path: read.append(path.name) or values(path))
    assert choose_pixel_range(None, [train_split(root)], lambda _: None) == (0, 65535)
    assert read == ["train-1.png", "train-9.png"]


def test_data_sets_of_different_cameras_are_said(tmp_path: Path) -> None:
    one = train_split(deep_set(tmp_path / "one", (SPREAD * 4000).astype(np.uint16)))
    other = train_split(deep_set(tmp_path / "other", (29000 + SPREAD * 2000).astype(np.uint16)))
    said: list[str] = []
    low, high = choose_pixel_range(None, [one, other], said.append) or (0, 0)
    assert low == 0
    assert high >= 31000
    assert "warning: the data sets differ in pixel values" in said[1]
    assert "one" in said[1]
    assert "0..4095" in said[1]
    empty = deep_set(tmp_path / "nan", np.full((48, 64), np.nan, np.float32), ".tif")
    assert choose_pixel_range(None, [train_split(empty)], said.append) is None


def test_a_sheet_shows_them_and_weights_keep_it(tmp_path: Path) -> None:
    dark = (SPREAD * 1000).astype(np.uint16)
    sheet = contact_sheet(find_layout(deep_set(tmp_path, dark)), tile=64)
    assert sheet[24:, 32:60].mean() > 100
    config = ModelConfig(pixel_range=(29000, 31000))
    assert parse_model_config(json.loads(json.dumps(config.model_dump(mode="json")))).pixel_range == (29000, 31000)


def test_the_users_range_wins_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    split, said = train_split(deep_set(tmp_path, GREY.astype(np.uint16))), list[str]()
    given = load_config(assignments=["model.pixel_range=[100, 200]"]).model.pixel_range
    assert choose_pixel_range(given, [split], said.append) == (100, 200)
    assert said == ["pixel values: 100..200 becomes 0..255 in pictures of more than 8 bits (model.pixel_range)"]
    for wrong in ("[200, 100]", "[1, 1]", "[1]", "[0, .inf]", "x"):
        with pytest.raises(UserError, match="pixel_range"):
            load_config(assignments=[f"model.pixel_range={wrong}"])


def test_the_range_is_said_by_check_and_kept_in_the_config(tmp_path: Path) -> None:
    root = deep_set(tmp_path, (29000 + SPREAD * 2000).astype(np.uint16))
    report = check(load_config(overrides={"data.root": str(root)}))
    (line,) = report.notes
    assert "use 29000..31000" in line
    assert line in report.text()
    config = Config()
    config.model.pixel_range = (0, 4095)
    assert "pixel_range:\n  - 0.0\n  - 4095.0" in config.to_yaml().replace("    - ", "  - ")


def test_nan_and_frames_are_counted(tmp_path: Path) -> None:
    values = SPREAD.astype(np.float32)
    values[2, 3] = np.nan
    values[4, 5] = np.inf
    root = deep_set(tmp_path, values, ".tif")
    still, other = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    still.save(root / "images" / "train-2.tif", save_all=True, append_images=[other])
    split = train_split(root)
    count_oddities(split)
    found = {problem.kind: problem.examples for problem in split.problems}
    assert found == {
        "picture with several frames or pages: the first one is used": ["train-2.tif"],
        "picture with values that are NaN or infinite: taken as the lowest": ["train-1.tif: 2 of 3072"],
    }
    image = read_image(root / "images" / "train-1.tif", pixel_range=(0.0, 1.0))
    assert image[2, 3].max() == image[4, 5].max() == 0
    assert np.abs(image[10:, :, 0] - (values[10:] * 255)).max() <= 0.51
