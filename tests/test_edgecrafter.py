"""ECDet, ECSeg and ECPose, as the authors' files and as folders of the Hub, give what the original code gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision import Model, UserError, load
from mvision.backbone import ecvit
from mvision.structures.coco_names import coco_with_keypoints
from mvision.weights import edgecrafter, init_from, read_weights, zoo
from mvision.weights.edgecrafter import MEAN, mvision_name
from mvision.weights.files import Weights
from tests.edgecrafter_files import (
    BLOCKS,
    CASES,
    EC,
    KEPT,
    LARGE,
    MASKS,
    SHALLOW,
    family_of,
    golden,
    has_poses,
    make_images,
    write_folder,
    write_original,
)
from tests.original_files import change

TASKS = {"ecdet": "detection", "ecseg": "instance-seg", "ecpose": "keypoints"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("edgecrafter")
    return {case: write_original(folder / f"{case} of mine.pth", case) for case in EC}


@pytest.fixture(scope="module")
def stored(files: dict[str, Path]) -> dict[str, Weights]:
    """What the files of the small models say."""
    return {case: read_weights(file) for case, file in files.items()}


@pytest.fixture(scope="module")
def model_of(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The model of a case; the backbones of L and X have fewer blocks than a published file has to have."""

    @cache
    def model_of(case: str) -> Model:
        if case not in LARGE:
            return load(files[case])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ecvit, "DEPTH", SHALLOW)
            patch.setattr(edgecrafter, "_DEPTH", SHALLOW)
            return load(write_original(tmp_path_factory.mktemp("large") / f"{case} of mine.pth", case))

    return model_of


def outputs(model: Model, case: str, side: int) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    with torch.no_grad():
        return model(make_images(case, side).to(parameter.dtype))[TASKS[family_of(case)]]


def differences(model: Model, case: str, side: int) -> dict[str, float]:
    """Largest differences from what the original gave."""
    _, expected = golden(case)
    found = outputs(model, case, side)
    kept = {"logits": found["logits"][:, KEPT]}
    kept |= {"points": found["keypoints"][:, KEPT]} if has_poses(case) else {"boxes": found["boxes"][:, KEPT]}
    return {
        kind: float((tensor - torch.from_numpy(expected[f"{kind} {side}"])).abs().max())
        for kind, tensor in kept.items()
    }


@pytest.mark.parametrize("case", [*EC, *LARGE])
def test_outputs_of_the_original_code(model_of: Callable[[str], Model], case: str) -> None:
    """In float32; the small ones in float64 too, where the original keeps its tables of positions in float32."""
    sides, model = CASES[case]["sizes"], model_of(case)
    assert max(max(differences(model, case, side).values()) for side in sides) < 1e-5
    if case not in LARGE:
        exact = copy.deepcopy(model).double()
        assert max(max(differences(exact, case, side).values()) for side in sides) < 2e-7


@pytest.mark.parametrize("case", ["ecseg", "ecseg-l", "ecseg-x"])
def test_masks_of_the_original_code(
    model_of: Callable[[str], Model], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published, with the first block alone, and with all, as the authors' export has them."""
    _, expected = golden(case)
    model = model_of(case)
    head = model.head("instance-seg")
    assert head.config.mask_blocks == "first"
    for side in CASES[case]["sizes"]:
        wanted = {blocks: torch.from_numpy(expected[f"masks, {blocks} {side}"]) for blocks in BLOCKS}
        assert (wanted["first"] - wanted["all"]).abs().max() > 0.5
        for blocks in BLOCKS:
            monkeypatch.setattr(head, "config", head.config.model_copy(update={"mask_blocks": blocks}))
            difference = (outputs(model, case, side)["masks"][MASKS] - wanted[blocks]).abs().max()
            # Logits near 20 in float32, which processors round differently: 1.0e-5 with AVX2, less with AVX-512.
            assert difference <= 2e-5 * wanted[blocks].std(), (blocks, side)


@pytest.mark.parametrize("case", EC)
def test_folders_of_the_hub(stored: dict[str, Weights], tmp_path: Path, case: str) -> None:
    one, other = read_weights(write_folder(tmp_path / "hub", case)), stored[case]
    assert one.config == other.config
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_what_the_tensors_say(stored: dict[str, Weights]) -> None:
    det, seg, pose = (stored[case].config for case in EC)
    assert [config.backbone.name for config in (det, seg, pose)] == ["ecvit_t"] * 3
    assert (det.neck.projections, seg.neck.projections) == ("last", True)
    assert (det.neck.fusion, det.neck.elan_conv, det.neck.elan_split, det.neck.lateral_act) == (
        "sum",
        False,
        True,
        False,
    )
    assert (det.neck.expansion, det.neck.depth, seg.neck.depth, det.neck.attention_act) == (0.34, 2, 3, "silu")
    assert [tuple(config.heads) for config in (det, seg, pose)] == [(TASKS[case],) for case in EC]
    head = det.heads["detection"].model_dump()
    assert (head["act"], head["position_once"], head["memory_projection"], head["position_mlp"]) == (
        *("silu", True, False, "deep"),
    )
    assert (head["class_loss"], head["gamma"], head["num_points"]) == ("mal", 1.5, [3, 6, 3])
    assert seg.heads["instance-seg"].model_dump()["mask_form"] == "refine"
    assert (pose.heads["keypoints"].model_dump()["act"], len(pose.categories[0].keypoints)) == ("relu", 17)
    assert {config.image_size for config in (det, seg, pose)} == {(128, 128)}


def test_images_are_normalised(model_of: Callable[[str], Model], stored: dict[str, Weights]) -> None:
    model = model_of("ecdet")
    assert model.backbone.mean is not None
    torch.testing.assert_close(model.backbone.mean.flatten(), torch.tensor(MEAN))
    assert "images normalised as for ImageNet" in "; ".join(stored["ecdet"].notes)


def test_boxes_alone_start_from_masks(files: dict[str, Path], stored: dict[str, Weights]) -> None:
    """``--init ecseg-s`` for detection takes everything but the mask layers."""
    config = stored["ecseg"].config.model_copy(deep=True)
    known = set(stored["ecdet"].config.heads["detection"].model_dump())
    settings = config.heads["instance-seg"].model_dump()
    values = {key: value for key, value in settings.items() if key in known}
    config = type(config).model_validate({**config.model_dump(), "heads": {"detection": values}})
    line = init_from(Model(config), files["ecseg"])
    assert "backbone loaded; neck loaded; head detection loaded" in line


def test_three_tasks_start_from_boxes(files: dict[str, Path], stored: dict[str, Weights]) -> None:
    source = stored["ecdet"].config
    masks = {**source.heads["detection"].model_dump(), "mask_form": "refine"}
    heads = {
        "detection": source.heads["detection"].model_dump(),
        "instance-seg": masks,
        "keypoints": {"kind": "query", "embed_dim": 192, "num_layers": 2},
    }
    categories = [category.model_dump() for category in coco_with_keypoints()]
    model = Model(type(source).model_validate({**source.model_dump(), "heads": heads, "categories": categories}))
    line = init_from(model, files["ecdet"])
    assert "backbone loaded; neck loaded" in line
    assert "head instance-seg loaded in part" in line
    assert "refine" in line
    assert "head keypoints" in line


def without(end: str) -> Any:
    """A function that removes the tensors whose names end in this."""

    def apply(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(end)]:
            del tensors[name]

    return apply


def refusal(path: Path, family: str | None = None) -> str:
    with pytest.raises(UserError) as failure:
        load(path, family=family)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 1000
    return str(failure.value)


def test_files_of_another_family(files: dict[str, Path], stored: dict[str, Weights], tmp_path: Path) -> None:
    assert "--family is deim, but its tensors are those of ECDet" in refusal(files["ecdet"], "deim")
    assert load(files["ecdet"], family="ecdet").config == stored["ecdet"].config
    (tmp_path / "ecseg_s.pth").symlink_to(files["ecdet"])
    assert "its name is that of ECSeg's files" in refusal(tmp_path / "ecseg_s.pth")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("backbone.projector.0.conv.weight", None), "a tensor is missing: neck.projections.2.conv.weight"),
        (change("backbone.backbone.blocks.3.attn.qkv.bias", None), "a tensor is missing: backbone.net.blocks.3"),
        (
            change("backbone.backbone.blocks.0.norm1.weight", torch.ones(64)),
            "an ECViT of 12 blocks of widths 64 and 768",
        ),
        (without("num_points_scale"), "cross_attn.num_points_scale, which tells how many points each level has"),
        (change("decoder.more", torch.zeros(1)), "a tensor is unknown: decoder.more"),
        (change("decoder.enc_score_head.weight", torch.zeros(7, 32)), "size mismatch for heads.detection"),
        (change("encoder.encoder.0.layers.0.self_attn.in_proj_weight", torch.zeros(7, 3)), "no three equal parts"),
        (change("decoder.dec_score_head.0.bias", torch.full((3,), float("nan"))), "not finite"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, edit: Any, message: str) -> None:
    tensors, _ = golden("ecdet")
    edit(tensors)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    assert message in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("backbone", "num_heads", 6, "backbone.num_heads is 6, and only 3 can be read"),
        ("backbone", "interaction_indexes", [9, 11], "backbone.interaction_indexes is [9, 11]"),
        ("encoder", "act", "gelu", "encoder.act is 'gelu', and only 'silu' can be read"),
        ("encoder", "hidden_dim", 256, "encoder.hidden_dim is 256, and only 192 can be read"),
        ("decoder", "activation", "relu", "decoder.activation is 'relu', and only 'silu' can be read"),
        ("decoder", "num_layers", 6, "decoder.num_layers is 6, and only 2 can be read"),
        ("decoder", "num_queries", "many", "num_queries is 'many'"),
        ("decoder", "mask_downsample_ratio", 4, "decoder.mask_downsample_ratio is 4"),
    ],
)
def test_descriptions_that_contradict_the_tensors(
    tmp_path: Path, part: str, key: str, value: Any, message: str
) -> None:
    folder = write_folder(tmp_path, "ecdet")
    description = json.loads((folder / "config.json").read_text())
    description[part][key] = value
    (folder / "config.json").write_text(json.dumps(description))
    assert message in refusal(folder)


def test_names() -> None:
    names = {
        "backbone.backbone.register_token": "backbone.net.cls_token",
        "backbone.backbone.patch_embed.convs.1.norm.weight": "backbone.net.patch_embed.convs.1.norm.weight",
        "encoder.fpn_blocks.0.cv2.0.bottlenecks.1.conv2.conv.weight": (
            "neck.top_down.0.branch1.csp.blocks.1.conv1x1.conv.weight"
        ),
        "decoder.decoder.layers.1.norm2.bias": "heads.detection.decoder.layers.1.norm3.bias",
        "decoder.decoder.segmentation_head.query_features_block.layers.2.bias": (
            "heads.detection.refine.query_mlp.layers.1.bias"
        ),
    }
    for theirs, ours in names.items():
        assert mvision_name(theirs, last_only=True, is_pose=False) == ours


def test_rows_of_the_table() -> None:
    model = zoo.MODELS["ecseg-l"]
    assert (model.hub, model.task, model.file) == ("Intellindust/ECSeg_L", "instance-seg", "ecseg_l.pth")
    assert "distilled from DINOv3" in model.of.note
