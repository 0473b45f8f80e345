"""The published models that mvision reads: what they are, how good, under which licence, and where their files are.

One table for ``mvision models``, docs/zoo.md and the short names that every option for weights takes. It imports next
to nothing, so that it can be printed at once.

AP is the publishers' own figure, not measured here; ``docs/scripts/zoo_check.py`` measures it. A Hub revision is given
where at least two projects that have nothing to do with each other use that commit. Otherwise the newest is taken, and
the commit that was downloaded is said. Checksums are of ``model.safetensors`` at that revision.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mvision.errors import UserError
from mvision.storage.cache import cache_dir
from mvision.weights.zoo_entries import BOTH, COCO, CROWDPOSE, FAMILIES, OBJECTS365, SIZES, Act, Size, ZooModel


def _hub(
    name: str,
    config: str,
    ap: float,
    hub: str,
    data: str = COCO,
    revision: str | None = None,
    sha256: str | None = None,
) -> ZooModel:
    family = name.partition("-")[0]
    release = "https://github.com/Peterande/storage/releases/download/dfinev1.0"
    file = _DFINE_FILES.get(name)
    return ZooModel(
        name, family, config, data, ap, SIZES[config], FAMILIES[family].act, hub, revision, sha256, file,
        file and f"{release}/{file}",
    )  # fmt: skip


def _drive(
    name: str, family: str, config: str | None, ap: float, number: str, file: str,
    data: str = COCO, size: Size | None = None, act: Act | None = None,
) -> ZooModel:  # fmt: skip
    return ZooModel(
        name, family, config, data, ap, size or SIZES[config or ""], act or FAMILIES[family].act, file=file,
        url=f"https://drive.google.com/file/d/{number}",
    )  # fmt: skip


def _edgecrafter(name: str, ap: float, task: str) -> ZooModel:
    family, size = name.split("-")
    file = f"{family}_{size}.pth"
    return ZooModel(
        name, family, f"{family}_{size}", COCO, ap, SIZES[f"{family}_{size}"], FAMILIES[family].act,
        hub=f"Intellindust/{FAMILIES[family].title}_{size.upper()}", file=file,
        url=f"https://github.com/capsule2077/edgecrafter/releases/download/edgecrafterv1/{file}", task=task,
    )  # fmt: skip


def _detrpose(size: str, ap: float, data: str) -> ZooModel:
    ending = "" if data == COCO else "_crowdpose"
    file = f"detrpose_hgnetv2_{size}{ending}.pth"
    return ZooModel(
        f"detrpose-{size}{ending.replace('_', '-')}", "detrpose", f"detrpose_{size}", data, ap,
        SIZES[f"detrpose_{size}"], FAMILIES["detrpose"].act, file=file,
        url=f"https://github.com/SebastianJanampa/DETRPose/releases/download/model_weights/{file}", task="keypoints",
    )  # fmt: skip


def _mask_rtdetr(size: str, ap: float) -> ZooModel:
    config, file = f"mask_rtdetr_{size}", f"mask_rtdetr_hgnetv2_{size}_6x_coco.pdparams"
    return ZooModel(
        f"mask-rtdetr-{size}", "mask-rtdetr", config, COCO, ap, SIZES[config], FAMILIES["mask-rtdetr"].act, file=file,
        url=f"https://paddledet.bj.bcebos.com/models/{file}", task="instance-seg",
    )  # fmt: skip


_DFINE_FILES = {
    f"dfine-{size}{ending}": f"dfine_{size}_{data}.pth"
    for ending, data, sizes in (("", "coco", "nsmlx"), ("-obj2coco", "obj2coco", "smx"), ("-obj365", "obj365", "smlx"))
    for size in sizes
} | {"dfine-l-obj2coco": "dfine_l_obj2coco_e25.pth"}
"""Of D-FINE's release on GitHub."""

# AP of RT-DETR is that of the files which were converted for the Hub, from the table of rtdetr_pytorch; the paper's own
# models are 0.1 to 0.2 better in three cases.
_MODELS = (
    _hub(
        "rtdetr-r18", "rtdetr_r18", 46.4, "PekingU/rtdetr_r18vd",
        revision="ac77a11ff0170a41b771c03264987f8ce2b0d753",
        sha256="fe87a5a30f5daf298d10794c7682a63b6107986f97d6a770ba948d89e4340093",
    ),
    _hub("rtdetr-r34", "rtdetr_r34", 48.9, "PekingU/rtdetr_r34vd"),
    _hub(
        "rtdetr-r50", "rtdetr_r50", 53.1, "PekingU/rtdetr_r50vd",
        revision="df939e661d8c52e80608d1ec566561aabd25a4e7",
        sha256="5263d5521eff3e356f6cd8a371fd5dfb891725beda5f713674f79669115cdc64",
    ),
    _hub("rtdetr-r101", "rtdetr_r101", 54.3, "PekingU/rtdetr_r101vd"),
    _hub("rtdetr-r18-obj2coco", "rtdetr_r18", 49.0, "PekingU/rtdetr_r18vd_coco_o365", BOTH),
    _hub(
        "rtdetr-r50-obj2coco", "rtdetr_r50", 55.2, "PekingU/rtdetr_r50vd_coco_o365", BOTH,
        revision="457857cec8ac28ddede40ecee9eed2beca321af8",
    ),
    _hub("rtdetr-r101-obj2coco", "rtdetr_r101", 56.2, "PekingU/rtdetr_r101vd_coco_o365", BOTH),
    _hub(
        "rtdetrv2-r18", "rtdetr_r18", 48.1, "PekingU/rtdetr_v2_r18vd",
        revision="5650961749fa93567c0d46fc7f43ea4f9e914107",
        sha256="d18309d0d7ea57048138885c4c6ecfcb1e24506fc6153b94ad484f8ab62c7115",
    ),
    _hub(
        "rtdetrv2-r34", "rtdetr_r34", 49.9, "PekingU/rtdetr_v2_r34vd",
        revision="5d60d8fb5eb2a3ee5575bf200ecbce4e2cfa420c",
    ),
    _hub(
        "rtdetrv2-r50", "rtdetr_r50", 53.4, "PekingU/rtdetr_v2_r50vd",
        revision="282494075698cab9faa1096ae26856890030c817",
        sha256="3331d977dbc0c7a6cdae9ec0b0b6ad156eb6720d65b7cf0fa710dcc541d88d71",
    ),
    _hub("rtdetrv2-r101", "rtdetr_r101", 54.3, "PekingU/rtdetr_v2_r101vd"),
    _hub(
        "dfine-n", "dfine_n", 42.8, "ustc-community/dfine-nano-coco",
        revision="066438d3d8f0da137a37b38fdf3368fd4afceced",
        sha256="19e06bdc873da819920a8d373b879721a5b9759d822f8213220bb09abbdab58b",
    ),
    _hub(
        "dfine-s", "dfine_s", 48.5, "ustc-community/dfine-small-coco",
        revision="f79e65b5fbb33ceb9d3ebba042955d7410c608f8",
        sha256="a144baff3a27bfd538fe37b11fa8d4fca5744b8c054b5301e7c699a1379cd18f",
    ),
    _hub(
        "dfine-m", "dfine_m", 52.3, "ustc-community/dfine-medium-coco",
        revision="4ab9f5e466432f4fcf9a9a023da6aa5ecc9c9829",
    ),
    _hub("dfine-l", "dfine_l", 54.0, "ustc-community/dfine-large-coco"),
    _hub("dfine-x", "dfine_x", 55.8, "ustc-community/dfine-xlarge-coco"),
    _hub("dfine-s-obj2coco", "dfine_s", 50.7, "ustc-community/dfine-small-obj2coco", BOTH),
    _hub("dfine-m-obj2coco", "dfine_m", 55.1, "ustc-community/dfine-medium-obj2coco", BOTH),
    _hub("dfine-l-obj2coco", "dfine_l", 57.3, "ustc-community/dfine-large-obj2coco-e25", BOTH),
    _hub("dfine-x-obj2coco", "dfine_x", 59.3, "ustc-community/dfine-xlarge-obj2coco", BOTH),
    _hub("dfine-s-obj365", "dfine_s", 30.5, "ustc-community/dfine-small-obj365", OBJECTS365),
    _hub("dfine-m-obj365", "dfine_m", 37.4, "ustc-community/dfine-medium-obj365", OBJECTS365),
    _hub("dfine-l-obj365", "dfine_l", 40.6, "ustc-community/dfine-large-obj365", OBJECTS365),
    _hub("dfine-x-obj365", "dfine_x", 46.5, "ustc-community/dfine-xlarge-obj365", OBJECTS365),
    _drive(
        "deim-n", "deim", "dfine_n", 43.0, "1ZPEhiU9nhW4M5jLnYOFwTSLQC1Ugf62e", "deim_dfine_hgnetv2_n_coco_160e.pth"
    ),
    _drive(
        "deim-s", "deim", "dfine_s", 49.0, "1tB8gVJNrfb6dhFvoHJECKOF5VpkthhfC", "deim_dfine_hgnetv2_s_coco_120e.pth"
    ),
    _drive(
        "deim-m", "deim", "dfine_m", 52.7, "18Lj2a6UN6k_n_UzqnJyiaiLGpDzQQit8", "deim_dfine_hgnetv2_m_coco_90e.pth"
    ),
    _drive(
        "deim-l", "deim", "dfine_l", 54.7, "1PIRf02XkrA2xAD3wEiKE2FaamZgSGTAr", "deim_dfine_hgnetv2_l_coco_50e.pth"
    ),
    _drive(
        "deim-x", "deim", "dfine_x", 56.5, "1dPtbgtGgq1Oa7k_LgH1GXPelg1IVeu0j", "deim_dfine_hgnetv2_x_coco_50e.pth"
    ),
    # The one model of this family with ReLU.
    _drive(
        "deim-x-obj2coco", "deim", "dfine_x", 59.5, "1RMNrHh3bYN0FfT5ZlWhXtQxkG23xb2xj",
        "deim_dfine_hgnetv2_x_obj2coco_24e.pth", BOTH, act="relu",
    ),
    _drive(
        "deim-rtdetrv2-r18", "deim-rtdetrv2", None, 49.0, "153_JKff6EpFgiLKaqkJsoDcLal_0ux_F",
        "deim_rtdetrv2_r18vd_coco_120e.pth", size=Size(20, 60, counted=False),
    ),
    _drive(
        "deim-rtdetrv2-r34", "deim-rtdetrv2", None, 50.9, "1O9RjZF6kdFWGv1Etn1Toml4r-YfdMDMM",
        "deim_rtdetrv2_r34vd_coco_120e.pth", size=Size(31, 92, counted=False),
    ),
    _drive(
        "deim-rtdetrv2-r50-m", "deim-rtdetrv2", None, 53.2, "10dLuqdBZ6H5ip9BbBiE6S7ZcmHkRbD0E",
        "deim_rtdetrv2_r50vd_m_coco_60e.pth", size=Size(33, 100, counted=False),
    ),
    _drive(
        "deim-rtdetrv2-r50", "deim-rtdetrv2", None, 54.3, "1mWknAXD5JYknUQ94WCEvPfXz13jcNOTI",
        "deim_rtdetrv2_r50vd_coco_60e.pth", size=Size(42, 136, counted=False),
    ),
    _drive(
        "deim-rtdetrv2-r101", "deim-rtdetrv2", None, 55.5, "1BIevZijOcBO17llTyDX32F_pYppBfnzu",
        "deim_rtdetrv2_r101vd_coco_60e.pth", size=Size(76, 259, counted=False),
    ),
    _drive("rtdetrv4-s", "rtdetrv4", "dfine_s", 49.8, "1jDAVxblqRPEWed7Hxm6GwcEl7zn72U6z", "RTv4-S-hgnet.pth"),
    _drive("rtdetrv4-m", "rtdetrv4", "dfine_m", 53.7, "1O-YpP4X-quuOXbi96y2TKkztbjroP5mX", "RTv4-M-hgnet.pth"),
    _drive("rtdetrv4-l", "rtdetrv4", "dfine_l", 55.4, "1shO9EzZvXZyKedE2urLsN4dwEv8Jqa_8", "RTv4-L-hgnet.pth"),
    _drive("rtdetrv4-x", "rtdetrv4", "dfine_x", 57.0, "19gnkMTgFveJsrOvSmEPQXCTG6v9oQHN3", "RTv4-X-hgnet.pth"),
    *(
        _edgecrafter(f"{family}-{size}", ap, task)
        for family, task, figures in (
            ("ecdet", "detection", (51.7, 54.3, 57.0, 57.9)),
            ("ecseg", "instance-seg", (43.0, 45.2, 47.1, 48.4)),
            ("ecpose", "keypoints", (68.9, 72.4, 73.5, 74.8)),
        )
        for size, ap in zip("smlx", figures)
    ),
    *(
        _detrpose(size, ap, data)
        for data, figures in ((COCO, (57.2, 67.0, 69.4, 72.5, 73.3)), (CROWDPOSE, (56.0, 67.4, 72.0, 73.3, 75.1)))
        for size, ap in zip("nsmlx", figures)
    ),
    *(_mask_rtdetr(size, ap) for size, ap in zip("smlxh", (41.0, 42.7, 45.7, 47.5, 50.6))),
)  # fmt: skip
MODELS: Mapping[str, ZooModel] = {model.name: model for model in _MODELS}
"""By short name, in the order in which they are listed."""

_NAME = re.compile(r"[a-zA-Z]\w*(-\w+)*")


def get(name: str) -> ZooModel:
    """The model with this short name; a UserError suggests the nearest name for one that is unknown."""
    if name not in MODELS:
        end = suggestion(name) or "'mvision models' lists their names"
        raise UserError(f"model {name[:100]}: no published model has this name; {end}")
    return MODELS[name]


def suggestion(name: str) -> str:
    """The nearest short name as the end of an error line, ``did you mean 'X'?``; empty if no name is like it."""
    near = difflib.get_close_matches(name.replace("_", "-")[:100].lower(), MODELS, n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def could_be_name(source: str) -> bool:
    """Whether a source that is neither a file nor a Hub id may be meant as a short name."""
    return _NAME.fullmatch(source) is not None


def of_file(name: str) -> ZooModel | None:
    """The model whose authors' file has this name, or which is saved under its short name; None if unknown.

    A browser adds `` (1)`` to the name of a second download, which does not count.
    """
    plain = re.sub(r"( ?\(\d+\))(?=\.\w+$)", "", name)
    return next((model for model in MODELS.values() if plain in (model.file, model.name + model.ending)), None)


def of_config(config: str, models: Iterable[ZooModel] = _MODELS) -> list[ZooModel]:
    """The models of a shipped config's architecture, those first that anybody can download at once."""
    found = [model for model in models if model.config == config]
    return sorted(found, key=lambda model: (model.hub is None, model.data != COCO))


def own_folder() -> Path:
    """Where files that a user has downloaded by hand are found by their short names, see ``own_copy``."""
    return cache_dir() / "weights"


def own_copy(model: ZooModel) -> Path | None:
    """A user's own copy of a model: ``NAME.pth`` (with the ending of the authors' file), or the folder ``NAME`` with
    ``config.json`` and ``model.safetensors``.

    Both in ``own_folder()``. None if there is neither.
    """
    folder, file = own_folder() / model.name, own_folder() / f"{model.name}{model.ending}"
    if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
        return folder
    return file if file.is_file() else None


def by_hand(model: ZooModel) -> str:
    """How to get a model's weights without mvision's help, as the end of an error line."""
    if model.hub is None and model.is_download:
        place = own_folder() / f"{model.name}{model.ending}"
        return f"on a machine with network download {model.url}, and save it as {place}"
    if model.hub is None:
        return f"download {model.url} (a page of Google Drive) and save it as {own_folder() / model.name}.pth"
    at = "" if model.revision is None else f"/tree/{model.revision}"
    return (
        f"on a machine with network open https://huggingface.co/{model.hub}{at}, and put its config.json, "
        f"preprocessor_config.json and model.safetensors into {own_folder() / model.name}/"
    )
