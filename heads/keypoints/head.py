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

from mvision.errors import UserError
from mvision.evaluation import BoxMetric, KeypointMetric
from mvision.heads.base import Head
from mvision.heads.keypoints.assignment import candidates, cell_values, keypoint_truth, many_cells, one_cell
from mvision.heads.keypoints.grid import CellLayers, Cells, make_cells
from mvision.heads.keypoints.heatmaps import STRIDE, PointMaps, likeliest, likely_reach
from mvision.heads.keypoints.losses import (
    Assigned,
    box_terms,
    compare,
    ignored_cells,
    map_term,
    point_terms,
    score_target,
    score_term,
)
from mvision.heads.query.matching import mean_over_processes
from mvision.neck.layers import RepBlock
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.oks import check_sigmas, keypoint_sigmas


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
        pixel_dim: width of the layers that make the pixel features for the maps in which points are found exactly (see
            ``mvision.heads.keypoints.heatmaps``); 0 leaves them out. ``instances`` alone have them.
        map_dim: channels of these features.
        top_k: cells that learn an object in one-to-many training.
        many_weight: weight of one-to-many training beside one-to-one.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        class_weight .. map_weight: of the loss terms: score; L1 and GIoU of the box; one minus OKS and L1 by the
            object's scale of the points that a cell expects, and visibility; the maps.
    """

    levels: Literal["finest", "all"] = "all"
    depth: int = Field(2, ge=1)
    embed_dim: int = Field(64, gt=0)
    predict: Literal["instances", "points"] = "instances"
    num_instances: int = Field(100, gt=0)
    sigmas: list[float] = []
    pixel_dim: int = Field(64, ge=0)
    map_dim: int = Field(32, gt=0)
    top_k: int = Field(10, ge=1)
    many_weight: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(1.5, ge=0)
    class_weight: float = Field(4.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    oks_weight: float = Field(1.0, ge=0)
    point_weight: float = Field(2.0, ge=0)
    visible_weight: float = Field(0.5, ge=0)
    map_weight: float = Field(8.0, ge=0)


class KeypointHead(Head[KeypointConfig, dict[str, Tensor]]):
    """RepBlocks and 1x1 convolutions on the neck's maps, for any classes with any numbers of keypoints.

    K is the largest number of points that a class has; of one with fewer, the first count. Classes without keypoints
    are not predicted.

    Outputs, for the N = ``num_instances`` best cells: ``logits`` (B, N, C) before the sigmoid, C being the classes with
    keypoints; ``boxes`` (B, N, 4) cxcywh in 0..1; ``keypoints`` (B, N, K, 2) x, y in 0..1; ``visibility`` (B, N, K)
    before the sigmoid; with maps ``similarity`` (B, N, K) in 0..1, what the OKS of each point is expected to be, which
    the scores of ``postprocess`` count as well. In training, what the loss makes them from, for all cells.

    Raises:
        UserError: no class has keypoints, ``sigmas`` do not fit them, or several have and ``predict`` is ``points``.
    """

    Config = KeypointConfig
    needs = frozenset({"boxes", "keypoints"})
    evaluator = KeypointMetric
    more_evaluators = (BoxMetric,)
    kind = "poses"

    def __init__(
        self,
        config: KeypointConfig,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        super().__init__(config, channels, strides, _with_sigmas(categories, config), lateral)
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
        # Objects without keypoints teach the neck as well, in the layers that are left out later.
        taught = len(categories) if with_boxes else 1
        self.many = CellLayers(width, taught, self.num_points, with_boxes) if config.many_weight else None
        self.maps: PointMaps | None = None
        if config.predict == "instances" and config.pixel_dim:
            sizes = (config.pixel_dim, config.map_dim, width, self.num_points)
            self.maps = PointMaps(channels, strides, lateral, *sizes)
        self._describe_classes(classes)

    @classmethod
    def lateral_stride(cls, config: KeypointConfig) -> int | None:
        """For the maps."""
        return STRIDE if config.predict == "instances" and config.pixel_dim else None

    def _describe_classes(self, classes: list[Category]) -> None:
        """Tensors about the classes; they follow from the categories and stay out of the weights."""
        table = torch.full((len(self.categories),), -1)
        labels = torch.tensor([self.categories.index(category) for category in classes])
        table[labels] = torch.arange(len(classes))
        sigmas = torch.ones(len(self.categories), self.num_points)
        exists = torch.zeros(len(self.categories), self.num_points, dtype=torch.bool)
        for row, category in enumerate(self.categories):
            count = len(category.keypoints)
            sigmas[row, :count] = torch.tensor(keypoint_sigmas(category))
            exists[row, :count] = True
        every = torch.arange(len(self.categories))
        tensors = {"table": table, "labels": labels, "every": every, "sigmas": sigmas, "exists": exists}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.table: Tensor
        self.labels: Tensor
        self.every: Tensor
        self.sigmas: Tensor
        self.exists: Tensor

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """The classes with keypoints."""
        return [category for category in categories if category.keypoints]

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor]:
        """The best cells of the neck's maps, or (with ``targets``, in training) all of them."""
        pixels = None if self.maps is None else self.maps.pixels(maps, lateral)
        maps = [tower(x) for tower, x in zip(self.towers, maps)]
        cells = make_cells(maps)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        if targets is None:
            return self._best(tokens, cells, pixels)
        outputs = {"centres": cells.centres, "sizes": cells.sizes}
        if pixels is not None:
            outputs |= {"pixels": pixels, "tokens": tokens}
        # The finest map's cells give the shape of the image where the labels don't.
        outputs["shape"] = torch.tensor(maps[0].shape[-2:])
        for branch, layers in (("one", self.one), ("many", self.many)):
            if layers is not None:
                outputs |= {f"{branch}_{name}": value for name, value in layers(tokens).items()}
        return outputs

    def loss(self, outputs: dict[str, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """``class``, ``box``, ``giou``, ``oks``, ``point`` and ``visible``, each followed by ``_one`` and ``_many``.

        Besides these ``map_one``, where there are maps. They are divided by the number of cells that learn an object
        (those of points: an object that has points), over all processes. ``predict: points`` has no terms of boxes, and
        no ``visible``: there the score of a point is its own similarity.
        """
        config = self.config
        terms = {}
        for branch, weight in (("one", 1.0), ("many", config.many_weight)):
            start = f"{branch}_"
            raw = {name.removeprefix(start): value for name, value in outputs.items() if name.startswith(start)}
            if not raw:
                continue
            taught = self._assign(raw, outputs, targets, branch == "many")
            for name, value in self._terms(raw, taught).items():
                terms[f"{name}_{branch}"] = weight * getattr(config, f"{name}_weight") * value
            if branch == "one" and self.maps is not None:
                value = map_term(self.maps, outputs["pixels"], outputs["tokens"], taught)
                terms["map_one"] = config.map_weight * value
        return terms

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_instances`` best (cell, class) pairs of every image, in pixels of the original images.

        Points that the class of an instance lacks are zeros.
        """
        probabilities = outputs["logits"].float().sigmoid()
        visible = outputs["visibility"].float().sigmoid()
        if "similarity" in outputs:
            # The score says how well the box fits; the OKS to expect of the points that are there says the rest.
            expected = (outputs["similarity"] * visible).sum(-1) / visible.sum(-1).clamp(min=1e-6)
            # The root of both keeps their order and their scale: a threshold means what it does for boxes.
            probabilities = (probabilities * expected[..., None]).sqrt()
        scores, index = probabilities.flatten(1).topk(probabilities.shape[1], dim=1)
        corners = cxcywh_to_xyxy(outputs["boxes"].float()).clamp(0, 1)
        # Labelled points lie in the image: what is found outside of it can only gain by being moved to its border.
        points = torch.cat((outputs["keypoints"].float().clamp(0, 1), visible[..., None]), -1)
        return [
            self._instances(corners[image], points[image], scores[image, keep], index[image, keep], size)
            for image, (keep, size) in enumerate(zip(scores >= threshold, sizes))
        ]

    def _instances(
        self, corners: Tensor, points: Tensor, scores: Tensor, pairs: Tensor, size: tuple[int, int]
    ) -> Instances:
        classes, cell = pairs % len(self.labels), pairs // len(self.labels)
        height, width = size
        own = points[cell] * self.exists[self.labels[classes]][..., None].to(points)
        return Instances(
            boxes=(corners[cell] * corners.new_tensor([width, height, width, height])).cpu().numpy(),
            scores=scores.cpu().numpy(),
            labels=self.labels[classes].cpu().numpy(),
            size=size,
            categories=self.categories,
            keypoints=(own * own.new_tensor([width, height, 1])).cpu().numpy(),
        )

    def _best(self, tokens: Tensor, cells: Cells, pixels: Tensor | None) -> dict[str, Tensor]:
        """Outputs of the cells with the best scores; boxes and points of the others are not even computed."""
        one = self.one
        logits = one.score_logits(one(tokens)) if one.score is None else one.score(tokens)
        count = min(self.config.num_instances, tokens.shape[1])
        best = logits.max(-1).values.topk(count, dim=1).indices
        tokens = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1]))
        logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
        found = one.decode(one(tokens), cells.at(best))
        outputs = {"logits": logits, "boxes": found.boxes, "visibility": found.visibility, "keypoints": found.points}
        if self.maps is not None and pixels is not None:
            maps = self.maps.logits(self.maps.read(pixels, found.boxes), tokens, found.boxes, found.points)
            shape = (pixels.shape[-2], pixels.shape[-1])
            reach = likely_reach(found.boxes, self.sigmas[self.labels[logits.argmax(-1)]], shape)
            points, similar = likeliest(maps, found.boxes, reach)
            outputs |= {"keypoints": points.to(found.points.dtype), "similarity": similar}
        return outputs

    def _assign(
        self, raw: dict[str, Tensor], outputs: dict[str, Tensor], targets: list[Targets], many: bool
    ) -> Assigned:
        """Which cells learn what from one set of last layers."""
        everything = many and self.one.score is not None
        table, labels = (self.every, self.every) if everything else (self.table, self.labels)
        height, width = outputs["shape"].tolist()
        cells = Cells(outputs["centres"], outputs["sizes"])
        truth = keypoint_truth(targets, table, self.num_points, (height, width), cells.centres.dtype)
        near = candidates(*cells, truth.boxes, 2 * self.config.top_k)
        index = (truth.image[:, None], near.cells)
        sigmas, exists = self.sigmas[labels][truth.classes].to(truth.areas), self.exists[labels][truth.classes]
        found = self.one.decode({name: value[index] for name, value in raw.items()}, cells.at(near.cells))
        compared = compare(found, truth, sigmas)
        scores = self.one.score_logits(raw)[(*index, truth.classes[:, None])].to(truth.areas).sigmoid()
        values = cell_values(near.closeness, scores, compared.near, compared.overlap, truth.labelled)
        place = (values, near.cells, truth.image)
        chosen = many_cells(*place, len(cells.centres), self.config.top_k) if many else one_cell(*place)
        labelled_classes = truth.labelled_classes
        if labelled_classes is not None and labelled_classes.shape[1] > 1:
            labelled_classes = labelled_classes[:, labels]
        return Assigned(truth, near, sigmas, exists, found, compared, values, chosen, labelled_classes)

    def _terms(self, raw: dict[str, Tensor], taught: Assigned) -> dict[str, Tensor]:
        """The loss of one set of last layers, unweighted."""
        truth, found, compared, chosen = taught.truth, taught.found, taught.compared, taught.chosen
        of_points = chosen & truth.labelled[:, None]
        # Of a class that has no points, the box is all there is to score.
        plain = ~taught.exists.any(-1)
        scored = chosen & (truth.labelled | plain)[:, None]
        # Objects without labelled points count too: what one label weighs does not depend on how many are missing.
        counts = torch.stack((chosen.sum(), (chosen & ~plain[:, None]).sum())).to(truth.areas)
        num_objects, num_posed = mean_over_processes(counts).clamp(min=1)
        row, column = scored.nonzero(as_tuple=True)
        cell = (truth.image[row], taught.near.cells[row, column])
        ignored = ignored_cells(taught.near.inside & ~plain[:, None], truth)
        if "boxes" not in raw:
            terms = point_terms(found, compared, truth, of_points, None)
            # Every point has a score of its own, whose target is how near that point is.
            pair, point = (truth.points[row, :, 2] > 0).nonzero(as_tuple=True)
            quality = score_target(compared.each, compared.overlap[..., None])[row, column][pair, point]
            where = (cell[0][pair], cell[1][pair], point)
            logits = self.one.visibility(raw)
            terms["class"] = (
                self._score_term(logits, where, quality, ignored, taught.labelled_classes) / self.num_points
            )
            return {name: value / num_posed for name, value in terms.items()}
        terms = point_terms(found, compared, truth, of_points, taught.exists)
        terms = {name: value / num_posed for name, value in terms.items()}
        # With maps, the OKS to expect of them is counted afterwards, in post-processing.
        by_box = compared.overlap.detach()
        quality = by_box if self.maps is not None else score_target(compared.near, by_box)
        quality = torch.where(plain[:, None], by_box, quality)[row, column]
        where = (*cell, truth.classes[row])
        logits = self.one.score_logits(raw)
        terms["class"] = self._score_term(logits, where, quality, ignored, taught.labelled_classes) / num_objects
        boxes = box_terms(found, compared, truth, chosen)
        return terms | {name: value / num_objects for name, value in boxes.items()}

    def _score_term(
        self,
        logits: Tensor,
        where: tuple[Tensor, ...],
        quality: Tensor,
        ignored: Tensor,
        labelled_classes: Tensor | None,
    ) -> Tensor:
        config = self.config
        settings = config.class_loss, config.alpha, config.gamma
        return score_term(logits, where, quality, ignored, *settings, labelled_classes)


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
