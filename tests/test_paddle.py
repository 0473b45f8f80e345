"""Mask-RT-DETR, as the files of PaddleDetection, gives what the original code gives."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mvision import Model, UserError, load
from mvision.config import load_config
from mvision.weights import init_from, read_weights, save_weights, zoo
from mvision.weights.paddle import mvision_name, read_paddle
from tests.paddle_files import CASES, KEPT, MASKS, golden, make_images, refusal, write

TASK = "instance-seg"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("paddle")
    return {case: write(folder / f"{case} of mine.pdparams", golden(case)[0]) for case in CASES}


def differences(model: Model, case: str, side: int) -> list[float]:
    """Of logits, boxes and masks the largest one from what the original gave, in shares of the largest number."""
    _, expected = golden(case)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        found = model(make_images(side).to(dtype))[TASK]
    kept = {"logits": found["logits"][:, KEPT], "boxes": found["boxes"][:, KEPT], "masks": found["masks"][MASKS]}
    wanted = {kind: torch.from_numpy(expected[f"{kind} {side}"]) for kind in kept}
    assert min(tensor.std() for tensor in wanted.values()) > 0.05
    return [float((kept[kind] - tensor).abs().max() / tensor.abs().max()) for kind, tensor in wanted.items()]


@pytest.fixture(scope="module")
def small(files: dict[str, Path]) -> Model:
    return load(files["s"])


@pytest.mark.parametrize("side", CASES["s"]["sizes"])
def test_outputs_of_the_original_code(small: Model, side: int) -> None:
    assert max(differences(small, "s", side)) < 1e-5
    assert max(differences(copy.deepcopy(small).double(), "s", side)) < 2e-7  # the file is in float32


def test_outputs_of_a_large_model(files: dict[str, Path]) -> None:
    model = load(files["l"])
    for side in CASES["l"]["sizes"]:
        assert max(differences(model, "l", side)) < 1e-5


def test_fused_for_prediction(small: Model) -> None:
    """The scales of 1 that the small backbone gets disappear."""
    model = copy.deepcopy(small).fuse()
    assert not [name for name in model.state_dict() if ".lab." in name]
    assert max(differences(model, "s", 128)) < 2e-5


def test_attention_on_another_map_is_noticed(files: dict[str, Path]) -> None:
    """It loads without complaint, as no tensor tells."""
    weights = read_weights(files["s"])
    config = weights.config.model_copy(deep=True)
    config.neck.attention_levels = "coarsest"
    model = Model(config).eval()
    model.load_state_dict(weights.tensors, strict=False)
    assert max(differences(model, "s", 128)) > 1e-2


def test_what_the_tensors_say(files: dict[str, Path]) -> None:
    small, large = (read_weights(files[case]) for case in CASES)
    assert (small.config.backbone.name, large.config.backbone.name) == ("hgnetv2_b1", "hgnetv2_b4")
    assert (small.config.neck.attention_levels, large.config.neck.attention_levels) == ([1], "coarsest")
    assert (small.config.neck.expansion, large.config.neck.num_layers, large.config.neck.embed_dim) == (0.5, 2, 48)
    head = large.config.heads[TASK].model_dump()
    assert (head["pixel_dim"], head["fine_dim"], head["mask_dim"], head["embed_dim"]) == (16, 12, 8, 32)
    assert head["boxes_from_masks"]
    assert [category.name for category in small.config.categories] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "attention on the map of stride 16" in "; ".join(small.notes)
    assert large.notes == ["read as Mask-RT-DETR: images in 0..1"]
    labels = small.tensors[f"heads.{TASK}.decoder.label_embed.weight"]
    assert (labels.shape, labels[-1].abs().max()) == ((4, 32), 0)


@pytest.mark.parametrize("size", "smlxh")
def test_configs_are_those_of_the_published_sizes(size: str) -> None:
    """What PaddleDetection's configs say, whose models ``read_paddle`` gives these settings."""
    network, width, layers, dims = {
        "s": ("hgnetv2_b1", 256, 1, (64, 32, 128)),
        "m": ("hgnetv2_b2", 256, 1, (64, 64, 128)),
        "l": ("hgnetv2_b4", 256, 1, (64, 64, 32)),
        "x": ("hgnetv2_b5", 384, 1, (128, 128, 128)),
        "h": ("hgnetv2_b6", 512, 2, (256, 128, 128)),
    }[size]
    model = load_config(f"mask_rtdetr_{size}").model
    head = model.heads[TASK].model_dump()
    assert (model.backbone.name, model.neck.embed_dim, model.neck.num_layers) == (network, width, layers)
    assert (head["pixel_dim"], head["fine_dim"], head["mask_dim"]) == dims
    assert (model.neck.attention_levels, model.neck.expansion) == (([1], 0.5) if size in "sm" else ("coarsest", 1.0))
    row = zoo.MODELS[f"mask-rtdetr-{size}"]
    assert (row.task, row.config, row.ending, row.place) == (
        TASK,
        f"mask_rtdetr_{size}",
        ".pdparams",
        "PaddleDetection",
    )


def test_round_trip(small: Model, tmp_path: Path) -> None:
    save_weights(small, tmp_path / "a.safetensors")
    again = read_weights(tmp_path / "a.safetensors")
    assert again.config == small.config
    assert all(torch.equal(value, again.tensors[name]) for name, value in small.state_dict().items())


def test_training_starts_from_them(files: dict[str, Path]) -> None:
    config = read_weights(files["s"]).config.model_copy(deep=True)
    config.categories = config.categories[:2]
    line = init_from(Model(config), files["s"])
    assert "backbone loaded; neck loaded; head instance-seg loaded; 2 of 2 classes matched by name" in line


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("neck.enc_mask_lateral.conv.weight", None, "a tensor is missing: heads.instance-seg.pixels.lateral.conv"),
        ("neck.lateral_convs.0.conv.weight", None, "a tensor is missing: neck.lateral_convs.0.conv.weight"),
        ("transformer.score_head.bias", None, "a tensor is missing: heads.detection.decoder.memory_class.bias"),
        ("transformer.tgt_embed.weight", np.zeros((2, 32), "f4"), "a tensor is unknown: decoder.tgt_embed.weight"),
        ("transformer.dec_norm.bias", np.zeros(7, "f4"), "size mismatch for heads.instance-seg.decoder.output_norm"),
        ("transformer.dec_norm.bias", np.zeros(32, "i8"), "type mismatch for heads.instance-seg.decoder.output_norm"),
        ("transformer.dec_norm.bias", np.full(32, np.nan, "f4"), "not finite: heads.instance-seg.decoder.output_norm"),
        ("transformer.denoising_class_embed.weight", np.zeros((9, 32), "f4"), "size mismatch for heads.instance-seg"),
        ("neck.encoder.0.layers.0.self_attn.in_proj_weight", np.zeros((3, 7), "f4"), "no three equal parts"),
        (
            "backbone.stem.stem4.conv.weight",
            np.zeros((33, 24, 1, 1), "f4"),
            "a stem of 24 and 33 channels",
        ),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    arrays, _ = golden("s")
    changed = {key: value for key, value in arrays.items() if key != name} | ({} if array is None else {name: array})
    assert message in refusal(write(tmp_path / "a.pdparams", changed))


def test_families(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--family is dfine, but its tensors are those of Mask-RT-DETR"):
        load(files["s"], family="dfine")
    assert load(files["s"], family="mask-rtdetr").config == read_paddle(files["s"]).config


def test_the_authors_file_by_short_name(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert "mask-rtdetr-s.pdparams" in zoo.by_hand(zoo.MODELS["mask-rtdetr-s"])
    (tmp_path / "weights" / "mask-rtdetr-s.pdparams").symlink_to(files["s"])
    assert read_weights("mask-rtdetr-s").config == read_weights(files["s"]).config
    assert zoo.of_file("mask_rtdetr_hgnetv2_s_6x_coco.pdparams") is zoo.MODELS["mask-rtdetr-s"]


def test_names() -> None:
    names = {
        "backbone.stages.1.blocks.0.aggregation_squeeze_conv.bn._mean": (
            "backbone.net.stages_1.blocks.0.aggregation.0.bn.running_mean"
        ),
        "neck.fpn_blocks.1.bottlenecks.2.conv2.bn._variance": "neck.top_down.1.blocks.2.conv1x1.norm.running_var",
        "neck.mask_feat_head.scale_heads.2.2.0.bn.bias": "heads.detection.pixels.scales.2.1.norm.bias",
        "transformer.input_proj.2.norm._mean": "heads.detection.decoder.input_proj.2.norm.running_mean",
        "transformer.mask_query_head.layers.1.weight": "heads.detection.mask_embed.layers.1.weight",
        "transformer.bbox_head.layers.0.bias": "heads.detection.decoder.memory_box.layers.0.bias",
    }
    for theirs, ours in names.items():
        assert mvision_name(theirs) == ours
