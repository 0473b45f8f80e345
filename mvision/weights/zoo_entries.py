"""What the table of published models consists of: publications, architectures with their cost, and sets of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Act = Literal["relu", "silu"]
COCO, OBJECTS365, BOTH, CROWDPOSE = "COCO", "Objects365", "Objects365, COCO", "CrowdPose"
"""What a model was trained on; ``BOTH``: first on Objects365, then on COCO."""
MEASURED = {OBJECTS365: "5,000 images of Objects365 val", CROWDPOSE: "CrowdPose test"}
"""What AP is measured on: COCO val2017 for data that is not here."""


@dataclass(frozen=True)
class Family:
    """Models of one publication.

    Attributes:
        title: its name as the authors write it.
        page: the authors' code, with their own table.
        paper: on arXiv.
        code_licence, weights_licence: SPDX identifiers, as the authors declare them.
        act: the activation of the decoder, which no tensor tells.
        note: what is to be known of the weights beside their licence.
    """

    title: str
    page: str
    paper: str
    act: Act
    code_licence: str = "Apache-2.0"
    weights_licence: str = "Apache-2.0"
    note: str = ""


_EDGECRAFTER = ("https://github.com/Intellindust-AI-Lab/EdgeCrafter", "https://arxiv.org/abs/2603.18739")
_TEACHER = "a DINOv3 model was the teacher of its training"
_DISTILLED = "the backbone was distilled from DINOv3 models; the authors' licence is Apache-2.0 nevertheless"

FAMILIES = {
    "rtdetr": Family("RT-DETR", "https://github.com/lyuwenyu/RT-DETR", "https://arxiv.org/abs/2304.08069", "relu"),
    "rtdetrv2": Family("RT-DETRv2", "https://github.com/lyuwenyu/RT-DETR", "https://arxiv.org/abs/2407.17140", "relu"),
    "dfine": Family("D-FINE", "https://github.com/Peterande/D-FINE", "https://arxiv.org/abs/2410.13842", "relu"),
    "deim": Family(
        "DEIM-D-FINE", "https://github.com/Intellindust-AI-Lab/DEIM", "https://arxiv.org/abs/2412.04234", "silu"
    ),
    "deim-rtdetrv2": Family(
        "DEIM-RT-DETRv2", "https://github.com/Intellindust-AI-Lab/DEIM", "https://arxiv.org/abs/2412.04234", "silu"
    ),
    "rtdetrv4": Family(
        "RT-DETRv4",
        "https://github.com/RT-DETRs/RT-DETRv4",
        "https://arxiv.org/abs/2510.25257",
        "silu",
        note=_TEACHER,
    ),
    "ecdet": Family("ECDet", *_EDGECRAFTER, "silu", note=_DISTILLED),
    "ecseg": Family("ECSeg", *_EDGECRAFTER, "silu", note=_DISTILLED),
    "ecpose": Family("ECPose", *_EDGECRAFTER, "relu", note=_DISTILLED),
    "detrpose": Family(
        "DETRPose", "https://github.com/SebastianJanampa/DETRPose", "https://arxiv.org/abs/2506.13027", "relu"
    ),
    "mask-rtdetr": Family(
        "Mask-RT-DETR",
        "https://github.com/PaddlePaddle/PaddleDetection",
        "https://arxiv.org/abs/2304.08069",
        "relu",
        note="the licence is that of PaddleDetection, which names no other one for its weights",
    ),
}


@dataclass(frozen=True)
class Size:
    """What a model of an architecture costs at 640 x 640.

    Attributes:
        parameters: millions.
        gflops: of one image; a multiply-add counts as two.
        counted: whether mvision counted both (``mvision info``, fused as for prediction, 80 classes, or a person with
            17 points); otherwise they
            are the publishers' figures.
    """

    parameters: float
    gflops: float
    counted: bool


SIZES = {
    "rtdetr_r18": Size(20.0, 58.4, counted=True),
    "rtdetr_r34": Size(31.2, 90.5, counted=True),
    "rtdetr_r50": Size(42.1, 131.7, counted=True),
    "rtdetr_r101": Size(74.8, 249.6, counted=True),
    "dfine_n": Size(3.8, 7.3, counted=True),
    "dfine_s": Size(10.3, 25.5, counted=True),
    "dfine_m": Size(19.3, 57.0, counted=True),
    "dfine_l": Size(30.9, 91.6, counted=True),
    "dfine_x": Size(61.8, 203.1, counted=True),
    "ecdet_s": Size(9.9, 50.0, counted=True),
    "ecdet_m": Size(19.3, 84.9, counted=True),
    "ecdet_l": Size(32.7, 147.2, counted=True),
    "ecdet_x": Size(49.0, 204.5, counted=True),
    "ecseg_s": Size(10.4, 55.1, counted=True),
    "ecseg_m": Size(20.2, 92.7, counted=True),
    "ecseg_l": Size(33.7, 155.0, counted=True),
    "ecseg_x": Size(50.0, 212.3, counted=True),
    "ecpose_s": Size(10.0, 54.2, counted=True),
    "ecpose_m": Size(19.9, 94.7, counted=True),
    "ecpose_l": Size(34.4, 159.2, counted=True),
    "ecpose_x": Size(50.7, 219.8, counted=True),
    "detrpose_n": Size(4.1, 9.4, counted=True),
    "detrpose_s": Size(11.7, 33.5, counted=True),
    "detrpose_m": Size(20.9, 67.7, counted=True),
    "detrpose_l": Size(33.0, 107.7, counted=True),
    "detrpose_x": Size(73.8, 240.3, counted=True),
    "mask_rtdetr_s": Size(14.4, 51.9, counted=True),
    "mask_rtdetr_m": Size(18.6, 67.0, counted=True),
    "mask_rtdetr_l": Size(32.0, 115.6, counted=True),
    "mask_rtdetr_x": Size(66.8, 254.8, counted=True),
    "mask_rtdetr_h": Size(126.6, 523.9, counted=True),
}
"""Shipped config -> what a model of its architecture costs."""


_PLACES = {
    "github.com": "GitHub",
    "drive.google.com": "Google Drive",
    "paddledet.bj.bcebos.com": "PaddleDetection",
}


@dataclass(frozen=True)
class ZooModel:
    """One set of published weights.

    Attributes:
        name: the short name.
        family: a key of ``FAMILIES``.
        config: the shipped config of this architecture; None where none is shipped.
        data: what it was trained on: ``COCO``, ``OBJECTS365``, ``BOTH`` or ``CROWDPOSE``.
        ap: published AP in percent, of what its task predicts (boxes, masks, keypoints): on COCO val2017, and for
            ``OBJECTS365`` on the first 5000 images of its val, for ``CROWDPOSE`` on its test images.
        size: cost in parameters and FLOPs.
        act: the activation of the decoder.
        hub: repository on the Hugging Face Hub; None: it is not there.
        revision: commit of that repository; None: the newest.
        sha256: of the repository's ``model.safetensors``.
        file: name of the authors' own file.
        url: where that file is to be had: its own address, or a page of Google Drive.
        task: what it predicts.
    """

    name: str
    family: str
    config: str | None
    data: str
    ap: float
    size: Size
    act: Act
    hub: str | None = None
    revision: str | None = None
    sha256: str | None = None
    file: str | None = None
    url: str | None = None
    task: str = "detection"

    @property
    def of(self) -> Family:
        """The publication that it comes from."""
        return FAMILIES[self.family]

    @property
    def licence(self) -> str:
        """Of code and weights, in one word where they are the same."""
        code, weights = self.of.code_licence, self.of.weights_licence
        return code if code == weights else f"code {code}, weights {weights}"

    @property
    def place(self) -> str:
        """Where the weights are, in a few words."""
        host = (self.url or "").removeprefix("https://").partition("/")[0]
        return self.hub or _PLACES[host]

    @property
    def is_download(self) -> bool:
        """Whether ``url`` is the file itself, and not a page that leads to it."""
        return self.url is not None and not self.url.startswith("https://drive.google.com/")

    @property
    def ending(self) -> str:
        """Of the name of the authors' own file, or of a copy of it under the short name."""
        return ".pdparams" if (self.file or "").endswith(".pdparams") else ".pth"

    @property
    def measured(self) -> str:
        """What ``ap`` was measured on."""
        return MEASURED.get(self.data, "COCO val2017")
