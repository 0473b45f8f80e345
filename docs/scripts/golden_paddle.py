"""Outputs of the original Mask-RT-DETR for the cases of ``tests/paddle_files.py``, into a file for the tests.

    git clone https://github.com/PaddlePaddle/PaddleDetection && git -C PaddleDetection checkout 666f597fd0
    pip install paddlepaddle==3.3.1 six
    python docs/scripts/golden_paddle.py PaddleDetection

The original code is imported from that folder and run as it is, in float64. Of its package only the files of the model
are imported; what they need of others stands in here. Images are square, as in the authors' trainings: for others it
divides the anchors' x by the height. The file has small files of ``paddle.save`` too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.paddle_files import CASES, CENTRED, CLASSES, GOLDEN, KEPT, MASKS, make_array, make_images

FROM = f"docs/scripts/golden_paddle.py from PaddlePaddle/PaddleDetection 666f597fd0, paddlepaddle {paddle.__version__}"

UTILS = "ppdet.modeling.transformers.utils"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paddledetection", type=Path, help="checkout of PaddleDetection")
    make_packages(parser.parse_args().paddledetection / "ppdet")
    arrays: dict[str, np.ndarray] = {"made by": np.array(FROM)}
    arrays |= {f"file {name}": np.frombuffer(content, np.uint8) for name, content in small_files().items()}
    shapes: dict[str, dict[str, list[int]]] = {}
    for case, settings in CASES.items():
        model = MaskRTDETR(settings).to(dtype="float64")
        model.eval()
        state = model.state_dict()
        for name, tensor in state.items():
            tensor.set_value(make_array(name, tuple(tensor.shape)).astype(np.float64))
        shapes[case] = {name: list(tensor.shape) for name, tensor in state.items()}
        images = paddle.to_tensor(make_images(settings["sizes"][0]).numpy())
        features = model.neck(model.backbone({"image": images}))[1]
        bias = (state[CENTRED].numpy() - features.mean([0, 2, 3]).numpy()).astype(np.float32)
        state[CENTRED].set_value(bias.astype(np.float64))
        arrays[f"{case} {CENTRED}"] = bias
        for side in settings["sizes"]:
            outputs = model(paddle.to_tensor(make_images(side).numpy()))
            arrays |= {f"{case} {kind} {side}": array.astype(np.float32) for kind, array in kept(*outputs).items()}
    arrays["shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


class MaskRTDETR(paddle.nn.Layer):
    """Backbone, neck and transformer of ``DETR`` in the original code, under the names that they have there."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        hgnet, hybrid, detr = (
            importlib.import_module(f"ppdet.modeling.{name}")
            for name in ("backbones.hgnet_v2", "transformers.hybrid_encoder", "transformers.mask_rtdetr_transformer")
        )
        self.backbone = hgnet.PPHGNetV2(settings["arch"], return_idx=[0, 1, 2, 3])
        detr.mask_to_box_coordinate = partial(importlib.import_module(UTILS).mask_to_box_coordinate, dtype="float64")
        layer = hybrid.TransformerLayer(settings["neck"], 8, settings["ffn"], 0.0, "gelu")
        self.neck = hybrid.MaskHybridEncoder(
            [shape.channels for shape in self.backbone.out_shape], [4, 8, 16, 32], settings["neck"],
            [settings["level"]], settings["layers"], layer, settings["prototypes"], expansion=settings["expansion"],
            mask_feat_channels=settings["mask_channels"],
        )  # fmt: skip
        self.transformer = detr.MaskRTDETR(
            CLASSES, settings["dim"], settings["queries"], "sine", [settings["neck"]] * 3, [8, 16, 32],
            settings["prototypes"], num_decoder_layers=settings["decoder_layers"], dim_feedforward=settings["dim_ffn"],
        )  # fmt: skip

    def forward(self, images: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        """Logits, boxes and masks for images in 0..1."""
        logits, boxes, masks, *_ = self.transformer(self.neck(self.backbone({"image": images})))
        return logits[-1], boxes[-1], masks[-1]


def kept(logits: paddle.Tensor, boxes: paddle.Tensor, masks: paddle.Tensor) -> dict[str, np.ndarray]:
    """What is kept of the outputs."""
    return {"logits": logits.numpy()[:, KEPT], "boxes": boxes.numpy()[:, KEPT], "masks": masks.numpy()[MASKS]}


def make_packages(place: Path) -> None:
    """Packages without their own ``__init__``, and a stand-in for the registry of models."""
    for name in (
        "ppdet",
        "ppdet.modeling",
        *(f"ppdet.modeling.{part}" for part in ("backbones", "heads", "transformers")),
    ):
        module = types.ModuleType(name)
        module.__path__ = [str(place / name.removeprefix("ppdet").replace(".", "/").lstrip("/"))]
        sys.modules[name] = module
    core, registry = types.ModuleType("ppdet.core"), types.ModuleType("ppdet.core.workspace")
    core.__path__ = []
    registry.register = registry.serializable = lambda cls: cls  # type: ignore[attr-defined]
    sys.modules |= {core.__name__: core, registry.__name__: registry}


def small_files() -> dict[str, bytes]:
    """What ``paddle.save`` makes of a linear layer and a norm with numbers that are multiples of 1/8."""
    model = paddle.nn.Sequential(("linear", paddle.nn.Linear(3, 2)), ("norm", paddle.nn.BatchNorm2D(2)))
    for tensor in model.state_dict().values():
        tensor.set_value((np.arange(tensor.size, dtype=np.float32) / 8 - 0.25).reshape(tensor.shape))
    state = model.state_dict()
    whole = {"protocol 2": (state, 2), "protocol 4": (state, 4), "nested": ({"model": state, "epoch": 3}, 4)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pdparams"
        contents = {}
        for name, (content, protocol) in whole.items():
            paddle.save(content, str(path), protocol=protocol)
            contents[name] = path.read_bytes()
        paddle.save(model.bfloat16().state_dict(), str(path))
        return contents | {"bfloat16": path.read_bytes()}


if __name__ == "__main__":
    main()
