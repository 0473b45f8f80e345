"""The authors' own files of DETRPose give what the original code gives; points of other skeletons move by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mvision import Model, UserError, load
from mvision.structures.category import Category
from mvision.structures.oks import COCO_SIGMAS, CROWDPOSE_SIGMAS
from mvision.weights import init_from, read_weights, zoo
from mvision.weights.files import Weights
from mvision.weights.poses import size_of_centres
from tests.edgecrafter_files import CASES, DETRPOSE, KEPT, golden, make_images, write_original


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detrpose")
    return {case: write_original(folder / f"{case} of mine.pth", case) for case in DETRPOSE}


@pytest.fixture(scope="module")
def stored(files: dict[str, Path]) -> dict[str, Weights]:
    """What the files say."""
    return {case: read_weights(file) for case, file in files.items()}


@pytest.mark.parametrize("case", DETRPOSE)
def test_outputs_of_the_original_code(files: dict[str, Path], case: str) -> None:
    model = load(files[case])
    _, expected = golden(case)
    for dtype, side in itertools.product((torch.float32, torch.float64), CASES[case]["sizes"]):
        model.to(dtype)
        with torch.no_grad():
            found = model(make_images(case, side).to(dtype))["keypoints"]
        for kind, tensor in (("logits", found["logits"]), ("points", found["keypoints"])):
            wanted = torch.from_numpy(expected[f"{kind} {side}"])
            assert wanted.std() > 0.02
            # The original keeps its tables of positions in float32.
            assert (tensor[:, KEPT] - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 1e-7)


def test_what_the_tensors_say(stored: dict[str, Weights]) -> None:
    nano, small = (stored[case].config for case in DETRPOSE)
    assert (nano.backbone.name, nano.backbone.strides, nano.backbone.normalize) == ("hgnetv2_b0", [16, 32], "none")
    assert (nano.image_size, small.image_size) == ((160, 160), (128, 128))
    assert (nano.neck.position, nano.neck.lateral_act, nano.neck.fusion_block) == ("fraction", True, "elan")
    heads = [config.heads["keypoints"].model_dump() for config in (nano, small)]
    assert [head["num_points"] for head in heads] == [6, 4]
    assert [head["bin_scale"] for head in heads] == [4.0, 8.0]
    assert [head["num_queries"] for head in heads] == [30, 40]
    assert all(head["learned_queries"] and not head["visibility"] for head in heads)
    (person,), (other,) = nano.categories, small.categories
    assert (person.name, person.id, person.keypoints) == ("person", 1, list(COCO_SIGMAS))
    assert (other.keypoints, other.sigmas) == (list(CROWDPOSE_SIGMAS), list(CROWDPOSE_SIGMAS.values()))


def test_what_is_left_out_is_said(stored: dict[str, Weights]) -> None:
    notes = "; ".join(stored["detrpose-s"].notes)
    for part in ("read as detrpose: ReLU", "the first class, which no label", "CrowdPose", "boxes are the extent"):
        assert part in notes


def test_four_points_of_which_two_have_known_names(files: dict[str, Path], stored: dict[str, Weights]) -> None:
    """Rows of those two are kept to the bit; the other points start from the mean."""
    source = stored["detrpose-n"]
    config = source.config.model_copy(deep=True)
    config.categories = [Category(id=1, name="person", keypoints=["tail", "left wrist", "paw", "nose"])]
    model = Model(config)
    line = init_from(model, files["detrpose-n"])
    assert "2 of 4 points matched by name (not in these weights: tail, paw)" in line
    state, decoder = model.state_dict(), "heads.keypoints.decoder."
    places = {1: list(COCO_SIGMAS).index("left_wrist"), 3: 0}
    for name, axis, rows in (
        ("point_tokens", 0, 1),
        ("point_label_embed", 0, 1),
        ("memory_points.layers.3.weight", 0, 2),
        ("memory_points.layers.3.bias", 0, 2),
        ("quality_heads.1.layers.0.weight", 1, 5),
    ):
        found = state[decoder + name].movedim(axis, 0).unflatten(0, (4, rows))
        given = source.tensors[decoder + name].float().movedim(axis, 0).unflatten(0, (17, rows))
        for index, place in places.items():
            assert torch.equal(found[index], given[place]), name
        assert torch.allclose(found[0], given.mean(0), atol=1e-6), name
    assert torch.equal(
        state[f"{decoder}class_heads.0.weight"], source.tensors[f"{decoder}class_heads.0.weight"].float()
    )
    assert "visible" not in line
    with torch.no_grad():
        assert model.eval()(make_images("detrpose-n", 160).float())["keypoints"]["keypoints"].shape[-2:] == (4, 2)


def test_the_same_points_in_another_order_follow_their_names(
    files: dict[str, Path], stored: dict[str, Weights]
) -> None:
    source = stored["detrpose-n"]
    config = source.config.model_copy(deep=True)
    config.categories = [Category(id=1, name="person", keypoints=list(COCO_SIGMAS)[::-1])]
    model = Model(config)
    assert "points matched" not in init_from(model, files["detrpose-n"])
    name = "heads.keypoints.decoder.point_tokens"
    assert torch.equal(model.state_dict()[name], source.tensors[name].float().flip(0))


def refusal(path: Path, family: str | None = None) -> str:
    with pytest.raises(UserError) as failure:
        load(path, family=family)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_files_of_another_family(files: dict[str, Path], tmp_path: Path) -> None:
    assert "--family is dfine, but its tensors are those of DETRPose" in refusal(files["detrpose-n"], "dfine")
    assert "did you mean 'detrpose'?" in refusal(files["detrpose-n"], "detrpos")
    (tmp_path / "ecpose_s.pth").symlink_to(files["detrpose-n"])
    assert "its name is that of ECPose's files" in refusal(tmp_path / "ecpose_s.pth")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.class_embed.0.weight", None, "a tensor is missing: heads.keypoints.decoder.class_heads.0.weight"),
        ("transformer.class_embed.0.weight", torch.zeros(5, 32), "different numbers of classes"),
        ("transformer.more", torch.zeros(1), "a tensor is unknown: heads.keypoints.decoder.more"),
        ("transformer.pose_enc.weight", torch.zeros(3, 32), "size mismatch for heads.keypoints.decoder.point_label"),
        ("encoder.lateral_convs.0.conv.weight", None, "a tensor is missing: neck.lateral_convs.0.conv.weight"),
        ("backbone.stem.stem1.conv.weight", torch.zeros(17, 3, 3, 3), "which timm does not have"),
        ("transformer.reg_scale", torch.tensor([float("nan")]), "bin_scale"),
        ("transformer.pre_pose_embed.layers.0.bias", torch.full((32,), float("inf")), "not finite"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    tensors, _ = golden("detrpose-n")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    torch.save({"model": tensors}, tmp_path / "a.pth")
    assert message in refusal(tmp_path / "a.pth")


def test_every_name_counts(tmp_path: Path) -> None:
    """Two tensors of the same shape that change places are noticed, whichever they are."""
    tensors, expected = golden("detrpose-s")
    layer = "transformer.decoder.layers.1."
    for one, two in (("within_norm.weight", "across_norm.weight"), ("gateway.norm.bias", "norm2.bias")):
        changed = {**tensors, layer + one: tensors[layer + two], layer + two: tensors[layer + one]}
        torch.save({"model": changed}, tmp_path / "a.pth")
        with torch.no_grad():
            found = load(tmp_path / "a.pth")(make_images("detrpose-s", 128).float())["keypoints"]["logits"][:, KEPT]
        assert (found - torch.from_numpy(expected["logits 128"])).abs().max() > 1e-3


def test_the_size_is_that_of_the_cells(files: dict[str, Path]) -> None:
    assert size_of_centres(None) is None
    centres = torch.tensor([[[0.5 / 7, 0.5 / 5], [0.9, 0.9]]]).logit()
    assert size_of_centres(centres) == (5, 7)


def test_published_files_are_on_github() -> None:
    model = zoo.MODELS["detrpose-x-crowdpose"]
    assert model.is_download
    assert model.place == "GitHub"
    assert zoo.of_file("detrpose_hgnetv2_x_crowdpose.pth") is model
