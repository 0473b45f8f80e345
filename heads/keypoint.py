"""Keypoints: a dense head of RepBlocks in which every cell predicts an object with its points.

Its last layers exist twice. In training one pair learns from many cells per object, which teaches the neck, and the
other from one cell per object, which teaches scores that need no suppression of duplicates (Wang et al., "YOLOv10",
NeurIPS 2024, section 3.1); predictions and exported graphs have the second alone. Unlike there, the gradient of both
reaches the RepBlocks: one linear layer could not tell a cell from its neighbour by features that nobody made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvision.boxes import cxcywh_to_xyxy
from mvision.errors import UserError
from mvision.heads.base import Head
from mvision.keypoint_cells import CellLayers, Cells, FoundPoints, make_cells
from mvision.keypoint_losses import (
    box_terms,
    compare,
    field_term,
    ignored_cells,
    point_terms,
    score_target,
    score_term,
)
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
from mvision.pixel_features import PixelFeatures
from mvision.point_field import STEPS, follow, follow_of
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets

FIELD_STRIDE = 4


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
        pixel_dim: width of the layers that make the field by which points are moved to their exact places (see
            ``mvision.point_field``); 0 leaves it out. ``instances`` alone have one.
        top_k: cells that learn an object in one-to-many training.
        many_weight: weight of one-to-many training beside one-to-one.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        class_weight .. field_weight: of the loss terms: score; L1 and GIoU of the box; one minus OKS, L1 by the
            object's scale and visibility of the points; the field.
    """

    levels: Literal["finest", "all"] = "all"
    depth: int = Field(2, ge=1)
    embed_dim: int = Field(64, gt=0)
    predict: Literal["instances", "points"] = "instances"
    num_instances: int = Field(100, gt=0)
    sigmas: list[float] = []
    pixel_dim: int = Field(64, ge=0)
    top_k: int = Field(10, ge=1)
    many_weight: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(1.5, ge=0)
    class_weight: float = Field(4.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    oks_weight: float = Field(5.0, ge=0)
    point_weight: float = Field(2.0, ge=0)
    visible_weight: float = Field(0.5, ge=0)
    field_weight: float = Field(1.0, ge=0)


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
        self,
        config: KeypointConfig,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: bool = False,
    ) -> None:
        super().__init__(config, channels[lateral:], strides[lateral:], _with_sigmas(categories, config))
        self.has_lateral = lateral
        beside = channels[0] if lateral else None
        channels, strides = channels[lateral:], strides[lateral:]
        classes = self.classes
        self.num_points = max(len(category.keypoints) for category in classes)
        levels = 1 if config.levels == "finest" else len(channels)
        width = config.embed_dim
        self.towers = nn.ModuleList(
            nn.Sequential(*(RepBlock(width if index else inside, width) for index in range(config.depth)))
            for inside in channels[:levels]
        )
        with_boxes = config.predict == "instances"
        self.one = CellLayers(width, len(classes), self.num_points, with_boxes)
        self.many = CellLayers(width, len(classes), self.num_points, with_boxes) if config.many_weight else None
        self.field: PixelFeatures | None = None
        if config.predict == "instances" and config.pixel_dim:
            points = 2 * self.num_points
            self.field = PixelFeatures(channels, strides, beside, FIELD_STRIDE, config.pixel_dim, points)
            nn.init.zeros_(self.field.out.weight)
        self._describe_classes(classes)

    @classmethod
    def lateral_stride(cls, config: KeypointConfig) -> int | None:
        """For the field."""
        return FIELD_STRIDE if config.predict == "instances" and config.pixel_dim else None

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
        beside = features[0] if self.has_lateral else None
        features = features[self.has_lateral :]
        field = None if self.field is None else self.field(features, beside)
        maps = [tower(feature) for tower, feature in zip(self.towers, features)]
        cells = make_cells(maps)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        if targets is None:
            return self._best(tokens, cells, field)
        outputs = {"centres": cells.centres, "sizes": cells.sizes}
        if field is not None:
            outputs["field"] = field
        # The finest map's cells give the shape of the image where the labels don't.
        outputs["shape"] = torch.tensor(maps[0].shape[-2:])
        for branch, layers in (("one", self.one), ("many", self.many)):
            if layers is not None:
                outputs |= {f"{branch}_{name}": value for name, value in layers(tokens).items()}
        return outputs

    def loss(self, outputs: dict[str, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """``class``, ``box``, ``giou``, ``oks``, ``point`` and ``visible``, each followed by ``_one`` and ``_many``.

        Besides these ``field``, where there is one. They are divided by the number of cells that learn an object (the
        field: of objects with labelled points), over all processes. ``predict: points`` has no terms of boxes, and no
        ``visible``: there the score of a point is its own similarity.
        """
        config = self.config
        height, width = outputs["shape"].tolist()
        cells = Cells(outputs["centres"], outputs["sizes"])
        truth = keypoint_truth(targets, self.table, self.num_points, (height, width), cells.centres.dtype)
        near = candidates(*cells, truth.boxes, 2 * config.top_k)
        field = outputs.get("field")
        terms = {}
        if field is not None:
            count = mean_over_processes(truth.labelled.sum().to(truth.areas)).clamp(min=1)
            learned = field_term(field, truth, self.sigmas[truth.classes].to(truth.areas))
            terms["field"] = config.field_weight * learned / count
        for branch, weight in (("one", 1.0), ("many", config.many_weight)):
            start = f"{branch}_"
            raw = {name.removeprefix(start): value for name, value in outputs.items() if name.startswith(start)}
            own = self._terms(raw, cells, truth, near, field, branch == "many") if raw else {}
            for name, value in own.items():
                terms[f"{name}_{branch}"] = weight * getattr(config, f"{name}_weight") * value
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

    def _best(self, tokens: Tensor, cells: Cells, field: Tensor | None) -> dict[str, Tensor]:
        """Outputs of the cells with the best scores; boxes and points of the others are not even computed."""
        one = self.one
        logits = one.score_logits(one(tokens)) if one.score is None else one.score(tokens)
        count = min(self.config.num_instances, tokens.shape[1])
        best = logits.max(-1).values.topk(count, dim=1).indices
        raw = one(tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1])))
        found = one.decode(raw, cells.at(best))
        points = found.points
        for _ in range(STEPS if field is not None else 0):
            points = follow(field, points)  # type: ignore[arg-type]
        return {
            "logits": logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1])),
            "boxes": found.boxes,
            "keypoints": points,
            "visibility": found.visibility,
        }

    def _terms(
        self,
        raw: dict[str, Tensor],
        cells: Cells,
        truth: KeypointTruth,
        near: Candidates,
        field: Tensor | None,
        many: bool,
    ) -> dict[str, Tensor]:
        """The loss of one set of last layers, unweighted."""
        image = truth.image
        index = (image[:, None], near.cells)
        found = self.one.decode({name: value[index] for name, value in raw.items()}, cells.at(near.cells))
        compared = compare(found, truth, self.sigmas[truth.classes].to(truth.areas))
        logits = self.one.score_logits(raw)
        scores = logits[(*index, truth.classes[:, None])].to(truth.areas).sigmoid()
        # Scores are about the points that prediction gives in the end.
        final = compared.near if field is None else self._final_oks(found, truth, field)
        values = cell_values(near.closeness, scores, final, compared.overlap, truth.labelled)
        place = (values, near.cells, image)
        chosen = many_cells(*place, len(cells.centres), self.config.top_k) if many else one_cell(*place)
        taught = chosen & truth.labelled[:, None]
        total, of_points = mean_over_processes(torch.stack((chosen.sum(), taught.sum())).to(truth.areas)).clamp(min=1)

        row, column = taught.nonzero(as_tuple=True)
        cell = (image[row], near.cells[row, column])
        ignored = ignored_cells(near.inside, truth)
        if "boxes" not in raw:
            terms = point_terms(found, compared, truth, taught, None)
            # Every point has a score of its own, whose target is how near that point is.
            pair, point = (truth.points[row, :, 2] > 0).nonzero(as_tuple=True)
            quality = score_target(compared.each, compared.overlap[..., None])[row, column][pair, point]
            where = (cell[0][pair], cell[1][pair], point)
            terms["class"] = self._score_term(self.one.visibility(raw), where, quality, ignored) / self.num_points
            return {name: value / of_points for name, value in terms.items()}
        terms = point_terms(found, compared, truth, taught, self.exists[truth.classes])
        quality = score_target(final, compared.overlap)[row, column]
        terms["class"] = self._score_term(logits, (*cell, truth.classes[row]), quality, ignored)
        terms = {name: value / of_points for name, value in terms.items()}
        return terms | {name: value / total for name, value in box_terms(found, compared, truth, chosen).items()}

    @torch.no_grad()
    def _final_oks(self, found: FoundPoints, truth: KeypointTruth, field: Tensor) -> Tensor:
        """(M, n) OKS of the points moved along the field."""
        points = found.points
        for _ in range(STEPS):
            points = follow_of(field, truth.image, points)
        moved = found._replace(points=points)
        return compare(moved, truth, self.sigmas[truth.classes].to(truth.areas)).near

    def _score_term(self, logits: Tensor, where: tuple[Tensor, ...], quality: Tensor, ignored: Tensor) -> Tensor:
        config = self.config
        return score_term(logits, where, quality, ignored, config.class_loss, config.alpha, config.gamma)


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
