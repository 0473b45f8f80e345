"""Reading the authors' own files (``.pth``) of D-FINE, DEIM, RT-DETRv4, DEIM-RT-DETRv2, RT-DETR and RT-DETRv2.

They hold tensors alone, so that everything else follows from these, see ``Structure``. One thing does not: D-FINE's
decoder has ReLU where DEIM's and RT-DETRv4's have SiLU, with the same names and shapes, and the wrong one gives wrong
boxes without any complaint. It is told by what only one family has, by the name of a published file, or by the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvision.errors import UserError
from mvision.structures.coco_names import COCO
from mvision.weights import zoo
from mvision.weights.dfine import read_bins
from mvision.weights.published import DECODER, TASK, Published, categories, label_names, parse
from mvision.weights.structure import Structure, points_of_levels


@dataclass(frozen=True)
class Family:
    """Models of one publication, beside what ``zoo.FAMILIES`` says of them.

    Attributes:
        kind: whose decoder it has, ``dfine`` or ``rtdetr``.
        training: settings of the head with which it was trained.
    """

    kind: str
    training: dict[str, Any] = field(default_factory=dict)


_MAL = {"class_loss": "mal", "gamma": 1.5}
FAMILIES = {
    "dfine": Family("dfine", {"shared_matches": True}),
    "deim": Family("dfine", {"shared_matches": True, **_MAL}),
    "rtdetrv4": Family("dfine", {"shared_matches": True, **_MAL}),
    "deim-rtdetrv2": Family("rtdetr", _MAL),
    "rtdetr": Family("rtdetr"),
    "rtdetrv2": Family("rtdetr"),
}
"""What ``--family`` takes."""
_TITLES = {"dfine": "D-FINE", "rtdetr": "RT-DETR"}
_SPELLED = {"relu": "ReLU", "silu": "SiLU"}
_ASSUMED = {80: "COCO", 366: "Objects365"}
# How names of files begin by which authors and trainers call the files of a family.
_STEMS = {
    r"deim[-_]rt": "deim-rtdetrv2",
    r"deim[-_](dfine|hgnet|[nsmlx]\b)": "deim",
    r"d-?fine[-_]": "dfine",
    r"(rt-?detrv4|rtv4)[-_]": "rtdetrv4",
}

# Numbers that mvision computes or that stand twice in the file.
_LEFT_OUT = re.compile(
    r"^decoder\.(anchors|valid_mask|decoder\.(up|reg_scale))$|\.n(um)?_points_scale$|\.pos_embed\d+$"
)
_TEACHER = "encoder.feature_projector."

# Name in the file -> name in mvision. Every rule is applied, in this order.
_RENAMED = [
    (r"^backbone\.stem\.", "backbone.net.stem."),
    (r"^backbone\.stages\.(\d+)\.", r"backbone.net.stages_\1."),
    (r"^backbone\.conv1\.conv1_1\.conv\.", "backbone.net.conv1.0."),
    (r"^backbone\.conv1\.conv1_1\.norm\.", "backbone.net.conv1.1."),
    (r"^backbone\.conv1\.conv1_2\.conv\.", "backbone.net.conv1.3."),
    (r"^backbone\.conv1\.conv1_2\.norm\.", "backbone.net.conv1.4."),
    (r"^backbone\.conv1\.conv1_3\.conv\.", "backbone.net.conv1.6."),
    (r"^backbone\.conv1\.conv1_3\.norm\.", "backbone.net.bn1."),
    (r"^encoder\.encoder\.(\d+)\.layers\.", r"neck.aifi.\1.layers."),
    (r"^encoder\.input_proj\.(\d+)\.(?:conv|0)\.", r"neck.projections.\1.conv."),
    (r"^encoder\.input_proj\.(\d+)\.(?:norm|1)\.", r"neck.projections.\1.norm."),
    (r"^encoder\.fpn_blocks\.", "neck.top_down."),
    (r"^encoder\.pan_blocks\.", "neck.bottom_up."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv1\.", r"neck.downsample_convs.\1.pointwise."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv2\.", r"neck.downsample_convs.\1.depthwise."),
    (r"^encoder\.", "neck."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.norm2\.", r"\1.ffn_norm."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv1\.", r"\1.conv1."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv2\.0\.", r"\1.branch1.csp."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv2\.1\.", r"\1.branch1.conv."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv3\.0\.", r"\1.branch2.csp."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv3\.1\.", r"\1.branch2.conv."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.cv4\.", r"\1.conv2."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.conv3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.conv1x1."),
    (r"^decoder\.input_proj\.(\d+)\.(?:conv|0)\.", r"head.input_proj.\1.conv."),
    (r"^decoder\.input_proj\.(\d+)\.(?:norm|1)\.", r"head.input_proj.\1.norm."),
    (r"^decoder\.enc_output\.(?:proj|0)\.", "head.memory_proj.0."),
    (r"^decoder\.enc_output\.(?:norm|1)\.", "head.memory_proj.1."),
    (r"^decoder\.enc_score_head\.", "head.memory_class."),
    (r"^decoder\.enc_bbox_head\.", "head.memory_box."),
    (r"^decoder\.denoising_class_embed\.", "head.label_embed."),
    (r"^decoder\.dec_score_head\.", "head.class_heads."),
    (r"^decoder\.dec_bbox_head\.", "head.box_heads."),
    (r"^decoder\.query_pos_head\.", "head.position."),
    (r"^decoder\.pre_bbox_head\.", "head.pre_box."),
    (r"^decoder\.decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"head.quality_heads.\1."),
    (r"^decoder\.decoder\.layers\.", "head.layers."),
    (r"^decoder\.(up|reg_scale)$", r"head.\1"),
    (r"^(head\.layers\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^(head\.layers\.\d+)\.cross_attn\.", r"\1.cross_attention."),
    (r"^(head\.layers\.\d+)\.gateway\.gate\.", r"\1.gate.linear."),
    (r"^(head\.layers\.\d+)\.gateway\.norm\.", r"\1.gate.norm."),
    (r"\.linear1\.", ".ffn.layers.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
    (r"^head\.", DECODER),
]
_BLOCK = re.compile(r"^backbone\.res_layers\.(\d+)\.blocks\.(\d+)\.(short|branch2[abc])\.(?:conv\.)?(conv|norm)\.")
_BRANCHES = {"branch2a": "1", "branch2b": "2", "branch2c": "3"}


def read_original(loaded: dict[str, Tensor], notes: list[str], path: Path, family: str | None = None) -> Published:
    """The model of a ``.pth`` file.

    Args:
        loaded, notes: what ``state_dict`` gave.
        path: for messages.
        family: a key of ``FAMILIES``; None: by the tensors, or by the name of the file if it is that of the zoo.

    Raises:
        UserError: it is of none of these families or of another one than was given, or it cannot be told which.
    """
    teacher = [name for name in loaded if name.startswith(_TEACHER)]
    name, act, reason = _family(path, loaded, family, bool(teacher))
    notes.append(f"read as {name}, {reason}: {_SPELLED[act]} in the decoder")
    if teacher:
        numbers = sum(loaded[tensor].numel() for tensor in teacher)
        notes.append(f"left out: {len(teacher)} tensors ({numbers:,} numbers) that only learn from a teacher")
    points = points_of_levels(loaded, path)
    size = image_size_of(loaded.get("decoder.anchors"))
    kept = {key: value for key, value in loaded.items() if key not in teacher and not _LEFT_OUT.search(key)}
    tensors = renamed(kept, mvision_name, path)
    bins, _ = read_bins(tensors)
    structure = Structure(tensors, path)
    names = label_names({}, tensors, path)
    if len(names) in _ASSUMED:
        notes.append(f"its {len(names)} classes, which have no names, taken for those of {_ASSUMED[len(names)]}")
    sections = {
        "backbone": structure.backbone(),
        "neck": structure.neck(),
        "heads": {TASK: structure.decoder(points) | bins | FAMILIES[name].training | {"act": act}},
        "categories": categories([category.name for category in COCO] if len(names) == len(COCO) else names),
        "image_size": size,
    }
    notes += _drop_layers_of_training(sections, tensors, name)
    return Published(parse(sections, path), tensors, notes)


def mvision_name(name: str) -> str:
    """mvision's name of a tensor of the file, but for fused attention weights, which become three tensors."""
    match = _BLOCK.match(name)
    if match:
        stage, block, place, kind = match.groups()
        if place == "short":
            module = "downsample.1" if kind == "conv" else "downsample.2"
        else:
            module = ("conv" if kind == "conv" else "bn") + _BRANCHES[place]
        return f"backbone.net.layer{int(stage) + 1}.{block}.{module}.{name[match.end() :]}"
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _family(path: Path, tensors: dict[str, Tensor], given: str | None, has_teacher: bool) -> tuple[str, str, str]:
    """The family, the activation of the decoder, and by what both were told."""
    kind = _kind(path, tensors)
    alike = [name for name, family in FAMILIES.items() if family.kind == kind]
    known = zoo.of_file(path.name) or zoo.MODELS.get(path.stem)
    named = known.family if known is not None else _by_stem(path.name)
    name = given or (known.family if known is not None else None)
    if given is not None and named is not None and named != given:
        raise UserError(
            f"weights {path}: its name is that of {zoo.FAMILIES[named].title}'s files, and --family is {given}; give "
            f"--family {named}, or rename the file"
        )
    if name is not None and name not in alike:
        raise UserError(
            f"weights {path}: {f'--family is {given}' if given else f'its name is that of {name} files'}, but its "
            f"tensors are those of {_TITLES[kind]}'s decoder: --family can be {', '.join(alike)}"
        )
    if has_teacher and name not in (None, "rtdetrv4"):
        raise UserError(f"weights {path}: --family is {name}, but only rtdetrv4 has tensors that learn from a teacher")
    if known is not None:
        return known.family, known.act, f"by its name the published {known.name}"
    if name is not None:
        return name, zoo.FAMILIES[name].act, "as --family says"
    if has_teacher:
        return "rtdetrv4", zoo.FAMILIES["rtdetrv4"].act, "which alone has tensors that learn from a teacher"
    if kind == "rtdetr" and "decoder.query_pos_head.layers.2.weight" in tensors:
        return "deim-rtdetrv2", zoo.FAMILIES["deim-rtdetrv2"].act, "which alone embeds positions by three layers"
    acts = ", ".join(f"{name} ({_SPELLED[zoo.FAMILIES[name].act]})" for name in alike)
    raise UserError(
        f"weights {path}: which family it is of cannot be told from its tensors, and the wrong one gives wrong boxes; "
        f"say it with --family: {acts}"
    )


def _kind(path: Path, tensors: dict[str, Tensor]) -> str:
    """Whose decoder the tensors are of."""
    if "decoder.decoder.layers.0.gateway.gate.weight" in tensors:
        return "dfine"
    if "decoder.decoder.layers.0.cross_attn.value_proj.weight" in tensors:
        return "rtdetr"
    titles = ", ".join(family.title for family in zoo.FAMILIES.values())
    raise UserError(f"weights {path}: not a model of {titles}, of which alone {path.suffix} files can be read")


def _by_stem(name: str) -> str | None:
    return next((family for stem, family in _STEMS.items() if re.match(stem, name.lower())), None)


def renamed(loaded: Mapping[str, Tensor], name_of: Callable[[str], str], path: Path) -> dict[str, Tensor]:
    """The tensors by mvision's names, fused weights of attention as those of queries, keys and values."""
    tensors = {}
    for name, tensor in loaded.items():
        before, fused, kind = name_of(name).partition(".in_proj_")
        if not fused:
            tensors[before] = tensor
            continue
        if tensor.ndim < 1 or len(tensor) % 3:
            raise UserError(f"weights {path}: the tensor {name} of shape {list(tensor.shape)} has no three equal parts")
        tensors |= {f"{before}.{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3))}
    return tensors


def _drop_layers_of_training(sections: dict[str, Any], tensors: dict[str, Tensor], family: str) -> list[str]:
    """Leave out decoder layers after the one that predicts: RT-DETR-R50-m has six, and predicts from the third.

    Returns:
        A note if there were any.
    """
    head = sections["heads"][TASK]
    is_medium = sections["backbone"]["name"] == "resnet50d" and sections["neck"]["expansion"] == 0.5
    if family not in ("rtdetr", "rtdetrv2") or not is_medium or head["num_layers"] <= 3:
        return []
    dropped = head["num_layers"] - 3
    later = re.compile(rf"{re.escape(DECODER)}(layers|class_heads|box_heads)\.([3-9]|\d\d+)\.")
    for name in [name for name in tensors if later.match(name)]:
        del tensors[name]
    head["num_layers"] = 3
    return [f"left out: the last {dropped} decoder layers, as R50-m predicts from the third"]


def image_size_of(anchors: Tensor | None) -> list[int]:
    """(height, width) of the model's input, by the distances of its anchors; 640 without any.

    Args:
        anchors: (1, S, 4) logits of cxcywh in 0..1, infinite at the border.
    """
    if anchors is None or anchors.ndim != 3 or anchors.shape[-1] != 4:
        return [640, 640]
    boxes = anchors[0].to(torch.float64)
    boxes = boxes[boxes.isfinite().all(-1)].sigmoid()
    if len(boxes) < 2:
        return [640, 640]
    finest = boxes[(boxes[:, 2] - boxes[:, 2].min()).abs() < 1e-3]
    return size_of_map(_count(finest[:, 1]), _count(finest[:, 0]), anchors.shape[1])


def _count(centres: Tensor) -> int:
    """How many positions a map has along an axis, by the smallest distance between two of them; 0 if there is none."""
    steps = centres.unique().diff()
    steps = steps[steps > 1e-5]
    return round(1 / float(steps.min())) if len(steps) else 0


def size_of_map(height: int, width: int, count: int) -> list[int]:
    """The size of the image whose finest map is of this size, given the number of positions of all maps."""
    for strides in ((8, 16, 32), (16, 32)):
        factor = strides[0]
        maps = [(height * factor // stride) * (width * factor // stride) for stride in strides]
        if sum(maps) == count:
            return [height * factor, width * factor]
    return [640, 640]
