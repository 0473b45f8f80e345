"""Keypoints: a dense head of RepBlocks in which every cell predicts an object with its points.

Its last layers exist twice. In training one pair learns from many cells per object, which teaches the neck, and the
other from one cell per object, which teaches scores that need no suppression of duplicates (Wang et al., "YOLOv10",
NeurIPS 2024, section 3.1); predictions and exported graphs have the second alone. Unlike there, the gradient of both
reaches the RepBlocks: one linear layer could not tell a cell from its neighbour by features that nobody made for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mvision.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from mvision.decoder import cell_centres
from mvision.errors import UserError
from mvision.heads.base import Head
from mvision.keypoint_losses import FoundPoints, box_terms, compare, ignored_cells, point_terms, score_term
from mvision.keypoint_matching import (
    Candidates,
    KeypointTruth,
    candidates,
    cell_values,
    keypoint_truth,
    many_cells,
    one_cell,
)
from mvision.layers import RepBlock
from mvision.matching import mean_over_processes
from mvision.oks import check_sigmas, keypoint_sigmas
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets

# Side of the boxes that a cell starts from, as a fraction of the image: on the finest of several levels (doubling from
# there, as in the query decoder), and where one level has objects of all sizes.
FINEST_SIZE, ONLY_SIZE = 0.05, 0.2
LARGEST_GROWTH = 4.0  # exponent; exp(4) times the size above is larger than any image


class KeypointConfig(Settings):
    """Settings of the keypoint head.

    Attributes:
        levels: ``all`` of the neck's maps, or the ``finest`` alone.
        depth: RepBlocks on each of them.
        embed_dim: their width.
        predict: ``instances``: every cell gives a score per class, a box, and points measured from and by that box.
            ``points``: K x (x, y, score) and nothing else, for data with one class; the box is drawn around the points
            and the score of an object is the mean of theirs.
        num_instances: objects that can be found in an image; may be changed after training.
        sigmas: of the OKS, one for each point, in place of those of the data set; for training and evaluation.
        top_k: cells that learn an object in one-to-many training.
        many_weight: weight of one-to-many training beside one-to-one.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        class_weight .. visible_weight: of the loss terms: score; L1 and GIoU of the box; one minus OKS, L1 by the
            object's scale and visibility of the points.
    """

    levels: Literal["finest", "all"] = "all"
    depth: int = Field(2, ge=1)
    embed_dim: int = Field(64, gt=0)
    predict: Literal["instances", "points"] = "instances"
    num_instances: int = Field(100, gt=0)
    sigmas: list[float] = []
    top_k: int = Field(10, ge=1)
    many_weight: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "mal"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(1.5, ge=0)
    class_weight: float = Field(4.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    oks_weight: float = Field(5.0, ge=0)
    point_weight: float = Field(2.0, ge=0)
    visible_weight: float = Field(0.5, ge=0)


class Cells(NamedTuple):
    """Where the cells of all levels lie: ``centres`` (S, 2) x, y in 0..1, and ``sizes`` (S,), what each starts from."""

    centres: Tensor
    sizes: Tensor


class KeypointHead(Head[KeypointConfig]):
    """RepBlocks and 1x1 convolutions on the neck's maps, for any classes with any numbers of keypoints.

    K is the largest number of points that a class has; of one with fewer, the first count. Classes without keypoints
    are not predicted.

    Outputs, for the N = ``num_instances`` best cells: ``logits`` (B, N, C) before the sigmoid, C being the classes with
    keypoints; ``boxes`` (B, N, 4) cxcywh in 0..1; ``keypoints`` (B, N, K, 2) x, y in 0..1; ``visibility`` (B, N, K)
    before the sigmoid. In training, what the loss makes them from, for all cells.

    Raises:
        UserError: no class has keypoints, ``sigmas`` do not fit them, or several have and ``predict`` is ``points``.
    """

    Config = KeypointConfig
    needs = frozenset({"boxes", "keypoints"})
    metric = "keypoints"
    also = ("bbox",)

    def __init__(
        self, config: KeypointConfig, channels: Sequence[int], strides: Sequence[int], categories: list[Category]
    ) -> None:
        super().__init__(config, channels, strides, _with_sigmas(categories, config))
        classes = self.predicted(self.categories)
        self.num_points = max(len(category.keypoints) for category in classes)
        levels = 1 if config.levels == "finest" else len(channels)
        width = config.embed_dim
        self.towers = nn.ModuleList(
            nn.Sequential(*(RepBlock(width if index else inside, width) for index in range(config.depth)))
            for inside in channels[:levels]
        )
        with_boxes = config.predict == "instances"
        self.one = LastLayers(width, len(classes), self.num_points, with_boxes)
        self.many = LastLayers(width, len(classes), self.num_points, with_boxes) if config.many_weight else None
        self._describe_classes(classes)

    def _describe_classes(self, classes: list[Category]) -> None:
        """Tensors about the classes; they follow from the categories and stay out of the weights."""
        table = torch.full((len(self.categories),), -1)
        labels = torch.tensor([self.categories.index(category) for category in classes])
        table[labels] = torch.arange(len(classes))
        sigmas = torch.ones(len(classes), self.num_points)
        exists = torch.zeros(len(classes), self.num_points, dtype=torch.bool)
        for row, category in enumerate(classes):
            count = len(category.keypoints)
            sigmas[row, :count] = torch.tensor(keypoint_sigmas(category))
            exists[row, :count] = True
        for name, tensor in (("table", table), ("labels", labels), ("sigmas", sigmas), ("exists", exists)):
            self.register_buffer(name, tensor, persistent=False)
        self.table: Tensor
        self.labels: Tensor
        self.sigmas: Tensor
        self.exists: Tensor

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """The classes with keypoints."""
        return [category for category in categories if category.keypoints]

    def forward(self, features: list[Tensor], targets: list[Targets] | None = None) -> dict[str, Tensor]:
        """The best cells of the neck's maps, or (with ``targets``, in training) all of them."""
        maps = [tower(feature) for tower, feature in zip(self.towers, features)]
        cells = self._cells(maps)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        if targets is None:
            return self._best(tokens, cells)
        outputs = {"centres": cells.centres, "sizes": cells.sizes}
        # The finest map's cells give the shape of the image where the labels don't.
        outputs["shape"] = torch.tensor(maps[0].shape[-2:])
        for prefix, last in (("", self.one), ("many_", self.many)):
            if last is not None:
                outputs |= {f"{prefix}{name}": value for name, value in last(tokens).items()}
        return outputs

    def loss(self, outputs: dict[str, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """Terms named ``class``, ``box``, ``giou``, ``oks``, ``point`` and ``visible``, and the same with ``_many``.

        They are divided by the number of cells that learn an object, over all processes. ``predict: points`` has no
        terms of boxes, and no ``visible``: there the score of a point is its own similarity.
        """
        height, width = outputs["shape"].tolist()
        cells = Cells(outputs["centres"], outputs["sizes"])
        truth = keypoint_truth(targets, self.table, self.num_points, (height, width), cells.centres.dtype)
        near = candidates(*cells, truth.boxes, 2 * self.config.top_k)
        terms = {}
        for prefix, ending, weight in (("", "", 1.0), ("many_", "_many", self.config.many_weight)):
            if f"{prefix}points" in outputs:
                own = {
                    name: outputs[f"{prefix}{name}"]
                    for name in ("logits", "boxes", "points")
                    if prefix + name in outputs
                }
                for name, value in self._terms(own, cells, truth, near, many=bool(prefix)).items():
                    terms[f"{name}{ending}"] = weight * getattr(self.config, f"{name}_weight") * value
        return terms

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_instances`` best (cell, class) pairs of every image, in pixels of the original images.

        Points that the class of an instance lacks are zeros.
        """
        probabilities = outputs["logits"].float().sigmoid()
        scores, index = probabilities.flatten(1).topk(probabilities.shape[1], dim=1)
        corners = cxcywh_to_xyxy(outputs["boxes"].float()).clamp(0, 1)
        # Labelled points lie in the image: what is found outside of it can only gain by being moved to its border.
        points = torch.cat(
            (outputs["keypoints"].float().clamp(0, 1), outputs["visibility"].float().sigmoid()[..., None]), -1
        )
        return [
            self._instances(corners[image], points[image], scores[image, keep], index[image, keep], size)
            for image, (keep, size) in enumerate(zip(scores >= threshold, sizes))
        ]

    def _instances(
        self, corners: Tensor, points: Tensor, scores: Tensor, pairs: Tensor, size: tuple[int, int]
    ) -> Instances:
        classes, cell = pairs % len(self.labels), pairs // len(self.labels)
        height, width = size
        own = points[cell] * self.exists[classes][..., None].to(points)
        return Instances(
            boxes=(corners[cell] * corners.new_tensor([width, height, width, height])).cpu().numpy(),
            scores=scores.cpu().numpy(),
            labels=self.labels[classes].cpu().numpy(),
            size=size,
            categories=self.categories,
            keypoints=(own * own.new_tensor([width, height, 1])).cpu().numpy(),
        )

    def _cells(self, maps: list[Tensor]) -> Cells:
        # In float32 or better: bf16 has a step of two pixels at 640.
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        first = ONLY_SIZE if len(maps) == 1 else FINEST_SIZE
        sizes = [
            torch.full((height * width,), first * 2.0**level, dtype=dtype, device=maps[0].device)
            for level, (height, width) in enumerate(shapes)
        ]
        return Cells(cell_centres(shapes, maps[0].device, dtype), torch.cat(sizes))

    def _best(self, tokens: Tensor, cells: Cells) -> dict[str, Tensor]:
        """Outputs of the cells with the best scores; boxes and points of the others are not even computed."""
        logits = self._logits(self.one(tokens)["points"]) if self.one.score is None else self.one.score(tokens)
        count = min(self.config.num_instances, tokens.shape[1])
        best = logits.max(-1).values.topk(count, dim=1).indices
        raw = self.one(tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1])))
        found = self._decode(raw, cells.centres[best], cells.sizes[best])
        chosen = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
        return {
            "logits": chosen,
            "boxes": found.boxes,
            "keypoints": found.points,
            "visibility": found.visibility,
        }

    def _logits(self, points: Tensor) -> Tensor:
        """Of cells without a score of their own, (..., 1): that of the mean score of their points."""
        mean = (
            points.to(torch.promote_types(points.dtype, torch.float32))[..., 2 * self.num_points :].sigmoid().mean(-1)
        )
        return torch.logit(mean, eps=1e-6)[..., None]

    def _decode(self, raw: dict[str, Tensor], centres: Tensor, sizes: Tensor) -> FoundPoints:
        """Boxes and points of cells, (..., S, 4) and so on, from their raw numbers and where they lie."""
        points = raw["points"].to(centres.dtype)
        visibility = points[..., 2 * self.num_points :]
        offsets = points[..., : 2 * self.num_points].unflatten(-1, (self.num_points, 2))
        sizes = sizes[..., None]
        if "boxes" not in raw:
            points = centres[..., None, :] + offsets * sizes[..., None]
            around = torch.cat((points.amin(-2), points.amax(-2)), -1)
            return FoundPoints(xyxy_to_cxcywh(around), points, visibility)
        box = raw["boxes"].to(centres.dtype)
        middle = centres + box[..., :2] * sizes
        extent = sizes * box[..., 2:].clamp(max=LARGEST_GROWTH).exp()
        # In a person's own box a shoulder is nearly always in the same place, whatever the person's size. The box is
        # given here: its own losses teach it.
        points = middle.detach()[..., None, :] + offsets * extent.detach()[..., None, :]
        return FoundPoints(torch.cat((middle, extent), -1), points, visibility)

    def _terms(
        self, raw: dict[str, Tensor], cells: Cells, truth: KeypointTruth, near: Candidates, many: bool
    ) -> dict[str, Tensor]:
        """The loss of one pair of last layers, unweighted."""
        config, image = self.config, truth.image
        index = (image[:, None], near.cells)
        found = self._decode(
            {name: value[index] for name, value in raw.items()}, cells.centres[near.cells], cells.sizes[near.cells]
        )
        compared = compare(found, truth, self.sigmas[truth.classes].to(truth.areas))
        logits = raw["logits"] if "logits" in raw else self._logits(raw["points"])
        scores = logits[(*index, truth.classes[:, None])].to(truth.areas).sigmoid()
        labelled = truth.labelled
        values = cell_values(near.closeness, scores, compared.near, compared.overlap, labelled)
        place = (values, near.cells, image, len(cells.centres))
        chosen = many_cells(*place, config.top_k) if many else one_cell(*place)
        taught = chosen & labelled[:, None]
        total, of_points = mean_over_processes(torch.stack((chosen.sum(), taught.sum())).to(truth.areas)).clamp(min=1)

        exists = self.exists[truth.classes] if "boxes" in raw else None
        terms = {name: value / of_points for name, value in point_terms(found, compared, truth, taught, exists).items()}
        ignored = ignored_cells(near.inside, truth)
        weighing = (ignored, config.class_loss, config.alpha, config.gamma)
        row, column = taught.nonzero(as_tuple=True)
        where = (image[row], near.cells[row, column])
        if "boxes" in raw:
            terms |= {name: value / total for name, value in box_terms(found, compared, truth, chosen).items()}
            quality = compared.near.detach()[row, column]
            terms["class"] = score_term(logits, (*where, truth.classes[row]), quality, *weighing) / of_points
        else:
            visible = truth.points[row, :, 2] > 0
            pair, point = visible.nonzero(as_tuple=True)
            quality = compared.each.detach()[row, column][pair, point]
            of_each = raw["points"][..., 2 * self.num_points :]
            loss = score_term(of_each, (where[0][pair], where[1][pair], point), quality, *weighing)
            terms["class"] = loss / self.num_points / of_points
        return terms


class LastLayers(nn.Module):
    """The 1x1 convolutions that end the head, on cells (B, S, width) in one row instead of maps.

    Returns ``points`` (B, S, 3 K), x, y of every point and then their scores, and unless ``with_boxes`` is False
    ``logits`` (B, S, C) and ``boxes`` (B, S, 4).
    """

    def __init__(self, width: int, num_classes: int, num_points: int, with_boxes: bool) -> None:
        super().__init__()
        self.score = nn.Linear(width, num_classes) if with_boxes else None
        self.box = nn.Linear(width, 4) if with_boxes else None
        self.points = nn.Linear(width, 3 * num_points)
        # Scores start at 0.01, boxes and points at their references, as in the query decoder.
        low = -math.log((1 - 0.01) / 0.01)
        nn.init.zeros_(self.points.weight)
        nn.init.zeros_(self.points.bias)
        if self.score is None or self.box is None:
            nn.init.constant_(self.points.bias[2 * num_points :], low)
            return
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, low)
        nn.init.zeros_(self.box.weight)
        nn.init.zeros_(self.box.bias)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        outputs = {"points": self.points(tokens)}
        if self.score is not None and self.box is not None:
            outputs |= {"logits": self.score(tokens), "boxes": self.box(tokens)}
        return outputs


def _with_sigmas(categories: list[Category], config: KeypointConfig) -> list[Category]:
    """The categories, checked, with the sigmas of the config in those that have keypoints."""
    classes = KeypointHead.predicted(categories)
    if not classes:
        names = ", ".join(category.name for category in categories[:5])
        raise UserError(
            f"keypoints: none of the classes ({names}) has keypoints; name them in the categories of the annotations, "
            'such as "keypoints": ["nose", "tail"]'
        )
    if config.predict == "points" and len(classes) > 1:
        names = ", ".join(category.name for category in classes[:5])
        raise UserError(
            f"model.heads.keypoints.predict: points has no scores for classes, and {len(classes)} have keypoints "
            f"({names}); use instances"
        )
    for category in classes if config.sigmas else ():
        if problem := check_sigmas(config.sigmas, len(category.keypoints)):
            raise UserError(
                f"model.heads.keypoints.sigmas: {problem} of class '{category.name}'; give one for each, or leave it "
                "empty for those of the data set (keypoint_sigmas of its categories)"
            )
    if not config.sigmas:
        return categories
    return [c.model_copy(update={"sigmas": list(config.sigmas)}) if c.keypoints else c for c in categories]
