"""The authors' own files of D-FINE, DEIM, RT-DETRv4 and DEIM-RT-DETRv2 give what the original code gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision import UserError, load
from mvision.commands.train import run_config
from mvision.heads.query.anchors import make_anchors
from mvision.structures.coco_names import COCO
from mvision.structures.objects365_names import OBJECTS365, UNUSED
from mvision.weights import init_from, read_weights, save_weights
from mvision.weights.originals import FAMILIES, _drop_layers_of_training, image_size_of, mvision_name
from mvision.weights.published import DECODER
from tests.original_files import CASES, KEPT, change, golden, make_images, write_original
from tests.test_weights import make_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of every family."""
    folder = tmp_path_factory.mktemp("originals")
    return {case: write_original(folder / f"weights of {case}.pth", case) for case in CASES}


def largest(model: Any, case: str) -> tuple[float, float]:
    """Differences of logits and boxes from what the original gave."""
    _, expected = golden(case)
    with torch.no_grad():
        found = model.double()(make_images(case))["detection"]
    logits, boxes = (torch.from_numpy(expected[kind]) for kind in ("logits", "boxes"))
    assert logits.std() > 0.05
    return (
        float((found["logits"][:, KEPT] - logits).abs().max()),
        float((found["boxes"][:, KEPT] - boxes).abs().max()),
    )


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_the_original_code(files: dict[str, Path], case: str) -> None:
    model = load(files[case], family=case)
    logits, boxes = largest(model, case)
    assert logits < 1e-6
    assert boxes < 1e-6


@pytest.mark.parametrize(("case", "other"), [("deim", "dfine"), ("deim-rtdetrv2", "rtdetr"), ("dfine", "deim")])
def test_the_wrong_activation_is_noticed(files: dict[str, Path], case: str, other: str) -> None:
    """It loads without complaint, as no tensor tells: this is what --family is for."""
    logits, boxes = largest(load(files[case], family=other), case)
    assert logits > 1e-2
    assert boxes > 1e-3


def test_what_the_tensors_say(files: dict[str, Path]) -> None:
    read = {case: read_weights(files[case], case).config for case in CASES}
    nano, small, medium, older = (read[case] for case in CASES)
    assert (nano.backbone.name, nano.backbone.strides, nano.image_size) == ("hgnetv2_b0", [16, 32], (320, 320))
    assert (small.image_size, medium.image_size) == ((128, 128), (640, 640))  # the latter has no anchors
    assert (nano.neck.expansion, nano.neck.depth, small.neck.depth, medium.neck.depth) == (0.34, 2, 1, 2)
    assert (medium.neck.embed_dim, medium.neck.ffn_dim, medium.neck.fusion_block) == (48, 40, "elan")
    heads = {case: config.heads["detection"].model_dump() for case, config in read.items()}
    assert (heads["dfine"]["num_points"], heads["deim-rtdetrv2"]["num_points"]) == ([6, 6], 4)
    assert heads["deim"]["num_points"] == [3, 6, 3]
    assert (heads["deim"]["bin_scale"], heads["rtdetrv4"]["bin_scale"]) == (4.0, 8.0)
    assert (heads["rtdetrv4"]["embed_dim"], heads["rtdetrv4"]["num_layers"], heads["rtdetrv4"]["ffn_dim"]) == (
        32,
        3,
        48,
    )
    assert [heads[case]["act"] for case in CASES] == ["relu", "silu", "silu", "silu"]
    assert [heads[case]["class_loss"] for case in CASES] == ["vfl", "mal", "mal", "mal"]
    assert (older.backbone.name, older.backbone.stage1_shortcut, older.neck.fusion_block) == ("resnet18d", True, "csp")
    assert (heads["deim-rtdetrv2"]["position_mlp"], heads["deim-rtdetrv2"]["gate"]) == ("deep", False)


def test_what_is_chosen_and_left_out_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    notes = "; ".join(read_weights(files["rtdetrv4"]).notes)  # the teacher's tensors tell the family
    assert "read as rtdetrv4, which alone has tensors that learn from a teacher: SiLU" in notes
    assert "left out: 2 tensors (1,176 numbers)" in notes
    assert "read as deim-rtdetrv2" in "; ".join(read_weights(files["deim-rtdetrv2"]).notes)
    both = write_original(tmp_path / "a.pth", "deim", model={"a": torch.zeros(1)})
    assert "the averaged weights (EMA) were taken" in "; ".join(read_weights(both, "deim").notes)
    assert read_weights(files["deim"], "deim").notes == ["read as deim, as --family says: SiLU in the decoder"]


def test_other_forms_of_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    """Published are the weights of the model alone; parallel training puts a word before every name."""
    tensors, _ = golden("dfine")
    expected = load(files["dfine"], family="dfine").state_dict()
    for content in ({"model": tensors}, tensors, {"model": {f"module.{name}": x for name, x in tensors.items()}}):
        torch.save(content, tmp_path / "dfine_n_coco.pth")
        found = load(tmp_path / "dfine_n_coco.pth").state_dict()  # the name of a published file tells the family
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_round_trip(files: dict[str, Path], tmp_path: Path) -> None:
    model = load(files["dfine"], family="dfine")
    save_weights(model, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_training_can_start_from_them(files: dict[str, Path]) -> None:
    """A model with other classes: everything is loaded, and the new classes start from the mean of the old ones."""
    source = read_weights(files["deim"], "deim")
    config = source.config.model_copy(deep=True)
    config.categories = make_model(["cat", "LABEL_1", "dog", "cow"]).categories
    from mvision import Model

    model = Model(config)
    line = init_from(model, files["deim"], family="deim")
    assert "backbone loaded; neck loaded; head detection loaded; 1 of 4 classes matched by name" in line
    assert "read as deim" in line
    name = "heads.detection.decoder.class_heads.1.weight"
    assert torch.equal(model.state_dict()[name][1], source.tensors[name][1].float())
    assert torch.allclose(model.state_dict()[name][3], source.tensors[name].mean(0).float(), atol=1e-6)


@pytest.mark.parametrize(("classes", "expected"), [(80, COCO), (366, [UNUSED, *OBJECTS365])])
def test_classes_without_names(tmp_path: Path, classes: int, expected: list[Any]) -> None:
    tensors, _ = golden("deim")
    for name, tensor in tensors.items():
        rows = len(tensor) if tensor.ndim else 0
        if re.search("score_head|class_embed", name):
            tensors[name] = torch.zeros(classes + rows - 3, *tensor.shape[1:])
    torch.save({"model": tensors}, tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth", "deim")
    assert read.config.categories == expected
    assert f"its {classes} classes, which have no names, taken for those of" in read.notes[-1]


@pytest.mark.parametrize(("size", "levels"), [((640, 640), 3), ((480, 800), 3), ((320, 128), 2), ((96, 64), 3)])
def test_the_image_size_is_that_of_the_anchors(size: tuple[int, int], levels: int) -> None:
    shapes = [(size[0] // stride, size[1] // stride) for stride in (8, 16, 32)[-levels:]]
    anchors, valid = make_anchors(shapes, torch.device("cpu"), torch.float32)
    assert image_size_of(torch.where(valid, anchors, torch.inf)) == list(size)


@pytest.mark.parametrize(("family", "layers"), [("rtdetrv2", 3), ("deim-rtdetrv2", 6)])
def test_layers_that_only_train_are_left_out(family: str, layers: int) -> None:
    """The authors' RT-DETR-R50-m predicts from the third of six; DEIM's has three."""
    head: dict[str, Any] = {"num_layers": 6}
    sections = {"backbone": {"name": "resnet50d"}, "neck": {"expansion": 0.5}, "heads": {"detection": head}}
    tensors = {
        f"{DECODER}{part}.{number}.weight": torch.zeros(1)
        for part in ("layers", "class_heads", "box_heads", "input_proj")
        for number in range(6)
    }
    notes = _drop_layers_of_training(sections, tensors, family)
    assert head["num_layers"] == layers
    assert len(tensors) == 6 + 3 * layers
    assert len(notes) == (layers == 3)


def test_the_run_has_the_architecture_of_the_file(files: dict[str, Path]) -> None:
    config = run_config(init=str(files["deim"]), family="deim", tasks=["detection"])
    assert config.model.heads["detection"].act == "silu"
    assert config.model.neck.fusion_block == "elan"
    with pytest.raises(UserError, match="say it with --family"):
        run_config(init=str(files["deim"]))


def test_names_of_every_kind_of_block() -> None:
    names = {
        "backbone.res_layers.0.blocks.0.short.conv.weight": "backbone.net.layer1.0.downsample.1.weight",
        "backbone.res_layers.2.blocks.0.short.conv.conv.weight": "backbone.net.layer3.0.downsample.1.weight",
        "backbone.res_layers.2.blocks.0.short.conv.norm.bias": "backbone.net.layer3.0.downsample.2.bias",
        "backbone.res_layers.3.blocks.2.branch2c.norm.running_var": "backbone.net.layer4.2.bn3.running_var",
        "encoder.input_proj.1.0.weight": "neck.projections.1.conv.weight",  # RT-DETR's first version
        "decoder.enc_output.1.bias": "heads.detection.decoder.memory_proj.1.bias",
    }
    for theirs, ours in names.items():
        assert mvision_name(theirs) == ours


def refusal(path: Path, family: str | None = None) -> str:
    with pytest.raises(UserError) as failure:
        load(path, family=family)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 1000
    return str(failure.value)


def test_a_family_that_cannot_be_told_is_asked_for(files: dict[str, Path]) -> None:
    assert "say it with --family: dfine (ReLU), deim (SiLU), rtdetrv4 (SiLU)" in refusal(files["deim"])
    assert "did you mean" in refusal(files["deim"], "deem")


@pytest.mark.parametrize(
    ("case", "name", "family", "message"),
    [
        ("deim", "deim_dfine_hgnetv2_s_coco_120e.pth", "dfine", "its name is that of DEIM-D-FINE's files"),
        ("deim", "deim_hgnetv2_s_mine.pth", "dfine", "--family deim, or rename the file"),
        ("deim", "dfine_s_coco.pth", "deim-rtdetrv2", "its name is that of D-FINE's files"),
        (
            "deim",
            "a.pth",
            "deim-rtdetrv2",
            "are those of D-FINE's decoder: --family can be dfine, deim, rtdetrv4",
        ),
        ("deim-rtdetrv2", "a.pth", "dfine", "tensors are those of RT-DETR's decoder: --family can be deim-rtdetrv2"),
        ("deim-rtdetrv2", "dfine_s_coco.pth", None, "its name is that of dfine files, but its tensors"),
        ("rtdetrv4", "a.pth", "deim", "only rtdetrv4 has tensors that learn from a teacher"),
    ],
)
def test_a_family_that_contradicts_the_file(
    files: dict[str, Path], tmp_path: Path, case: str, name: str, family: str | None, message: str
) -> None:
    (tmp_path / name).symlink_to(files[case])
    assert message in refusal(tmp_path / name, family)


def test_a_family_is_refused_where_it_says_nothing(tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path / "a.safetensors")
    assert "says itself what it is" in refusal(tmp_path / "a.safetensors", "deim")


def test_every_family_is_known_to_the_zoo() -> None:
    from mvision.weights import zoo

    with_readers_of_their_own = {"ecdet", "ecseg", "ecpose", "detrpose", "mask-rtdetr"}
    assert set(FAMILIES) | with_readers_of_their_own == set(zoo.FAMILIES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("encoder.input_proj.0.conv.weight", None), "a tensor is missing: neck.projections.0.conv.weight"),
        (change("decoder.dec_bbox_head.1.layers.2.bias", None), "a tensor is missing: heads.detection"),
        (change("decoder.more", torch.zeros(1)), "a tensor is unknown: decoder.more"),
        (change("decoder.enc_output.proj.weight", torch.zeros(7, 32)), "size mismatch for heads.detection"),
        (change("encoder.encoder.0.layers.0.self_attn.in_proj_weight", torch.zeros(7, 3)), "no three equal parts"),
        (change("backbone.stem.stem1.conv.weight", torch.zeros(17, 3, 3, 3)), "which timm does not have"),
        (change("decoder.decoder.layers.0.cross_attn.num_points_scale", torch.full((12,), 0.3)), "one over the number"),
        (change("decoder.decoder.layers.1.cross_attn.num_points_scale", torch.ones(3)), "tells of [1, 1, 1] points"),
        (change("decoder.reg_scale", torch.tensor([float("nan")])), "bin_scale"),
        (change("decoder.dec_score_head.0.bias", torch.full((3,), float("inf"))), "not finite"),
        (change("decoder.decoder.layers.0.gateway.gate.weight", None), "not a model of RT-DETR, RT-DETRv2, D-FINE"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, edit: Any, message: str) -> None:
    tensors, _ = golden("deim")
    edit(tensors)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    assert message in refusal(tmp_path / "a.pth", "deim")
