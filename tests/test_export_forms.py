"""Exports of the masks and poses that published weights have equal PyTorch; test_export.py has mvision's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mvision import Model, create_model
from mvision.deploy.compare import difference
from mvision.deploy.export import write_export, write_openvino
from mvision.deploy.exported import ExportedModel
from mvision.deploy.sessions import DESCRIPTION
from mvision.deploy.tracing import quiet
from tests.test_joint import CATEGORIES

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "num_layers": 2, "ffn_dim": 32, "num_queries": 10}
POSES: dict[str, Any] = {**SMALL, "kind": "query", "num_queries": 6}
FORMS: dict[str, dict[str, Any]] = {
    # Mask-RT-DETR's masks, whose boxes start from masks; test_joint_queries.py has poses of the queries of boxes.
    "prototypes": {
        "instance-seg": {
            **SMALL, "mask_form": "prototypes", "boxes_from_masks": True, "pixel_dim": 16, "fine_dim": 12,
            "mask_dim": 8, "output_norm": True, "shared_class_head": True, "shared_box_head": True,
        },
    },
    # ECSeg's masks as its figures were measured, with mvision's addition, and poses as ECPose and DETRPose have them.
    "refine": {
        "instance-seg": {
            **SMALL, "mask_form": "refine", "mask_blocks": "first", "lateral": True, "act": "silu", "gate": True,
            "box_refinement": "distribution", "location_quality": True, "position_once": True,
        },
        "keypoints": {**POSES, "learned_queries": True, "visibility": False},
    },
}  # fmt: skip


class Exported(NamedTuple):
    """A fused model and its exports."""

    model: Model
    onnx: Path
    openvino: Path


@pytest.fixture(scope="module", params=FORMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export as OpenVINO is made of the other one, as the command does."""
    onnx = pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    heads = FORMS[request.param]
    torch.manual_seed(0)
    model = create_model(
        "tiny",
        list(heads),
        categories=CATEGORIES,
        backbone__name="test_resnet",
        neck__embed_dim=32,
        image_size=(64, 96),
        **{f"heads__{task}": settings for task, settings in heads.items()},
    )
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))  # statistics for the norms
        for name, parameter in model.named_parameters():
            if name.endswith("refine.lateral.norm.weight"):
                parameter.add_(0.5)  # it starts at zero, which would hide the lateral
    model.eval().fuse()
    folder = tmp_path_factory.mktemp("forms")
    with quiet():
        write_export(model, folder / "made.onnx", "onnx")
    description = {entry.key: entry.value for entry in onnx.load(folder / "made.onnx").metadata_props}[DESCRIPTION]
    write_openvino(openvino.convert_model(str(folder / "made.onnx")), folder / "made_openvino", description)
    return Exported(model, folder / "made.onnx", folder / "made_openvino")


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_exports_equal_pytorch(exported: Exported, format: str) -> None:
    found = ExportedModel(getattr(exported, format))
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, outputs = exported.model(images), found(images)
    names = {task: sorted(of_task) for task, of_task in expected.items()}
    assert {task: sorted(of_task) for task, of_task in outputs.items()} == names
    for task in names:
        assert difference({task: expected[task]}, {task: outputs[task]})[0] < 1e-3, task
