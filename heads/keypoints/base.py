"""What both keypoint heads share: RepBlocks on the neck's maps, two sets of last layers, assignment and selection.

The last layers exist twice. In training, one set learns from many grid points per object (one-to-many), which trains
the neck better, and the other from one grid point per object (one-to-one), so that its scores need no suppression of
duplicates (Wang et al., "YOLOv10", NeurIPS 2024, section 3.1). Predictions and exported graphs use the one-to-one set
alone. Unlike in YOLOv10, the gradients of both sets reach the RepBlocks: from features that only the other set trains,
one linear layer could not tell a grid point from its neighbour.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.evaluation import BoxMetric, KeypointMetric
from mvision.heads.base import Head, only_best_class
from mvision.heads.keypoints.assignment import (
    assign_one2many,
    assign_one2one,
    candidates,
    compute_alignment,
    keypoint_targets,
)
from mvision.heads.keypoints.grid import GridPoints, PointLayers, PoseLayers, Raw, decode, make_grid
from mvision.heads.keypoints.heatmaps import Heatmaps, best_places, estimated_similarity_std
from mvision.heads.keypoints.losses import Assignment, compare
from mvision.heads.query.losses import quality_focal
from mvision.neck.layers import RepBlock
from mvision.settings import MAX_LAYERS, MAX_OBJECTS, MAX_WIDTH, Replacement, Settings
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.oks import check_sigmas, keypoint_sigmas

Branch = Literal["one2one", "one2many"]
BRANCHES: tuple[Branch, ...] = ("one2one", "one2many")
# Settings of ``KeypointConfig`` alone, which older weights files have for both kinds.
ONLY_DENSE = ("pixel_dim", "map_dim", "box_weight", "giou_weight", "visible_weight", "map_weight")


class KeypointSettings(Settings):
    """Settings that both keypoint heads have.

    Attributes:
        levels: ``all`` of the neck's maps, or the ``finest`` alone.
        depth: RepBlocks on each of them.
        embed_dim: their width.
        num_instances: the largest number of objects predicted in an image; may be changed after training.
        sigmas: of the OKS, one for each point, in place of those of the data set; for training and evaluation.
        top_k: positives per object in one-to-many training.
        many_weight: weight of one-to-many training relative to one-to-one; 0 leaves its layers out.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        class_weight, oks_weight, point_weight: of the loss terms: scores; one minus the OKS; L1 distance of the points
            divided by the root of the object's area.
    """

    levels: Literal["finest", "all"] = "all"
    depth: int = Field(2, ge=1, le=MAX_LAYERS)
    embed_dim: int = Field(64, gt=0, le=MAX_WIDTH)
    num_instances: int = Field(100, gt=0, le=MAX_OBJECTS)
    sigmas: list[float] = []
    top_k: int = Field(10, ge=1, le=MAX_OBJECTS)
    many_weight: float = Field(1.0, ge=0)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.75, ge=0)
    gamma: float = Field(1.5, ge=0)
    class_weight: float = Field(4.0, ge=0)
    oks_weight: float = Field(1.0, ge=0)
    point_weight: float = Field(2.0, ge=0)

    retired = {
        "predict": [
            Replacement("instances", {"kind": "dense"}),
            Replacement("points", {"kind": "minimal"}, without=frozenset(ONLY_DENSE)),
        ],
    }


class KeypointOutputs(NamedTuple):
    """What the loss reads.

    ``tokens``: (B, S, width) of the S grid points, from which the last layers predict. ``grid``: the grid points.
    ``shape``: height and width of the finest map, which has the aspect ratio of the input. ``one2one``, ``one2many``:
    raw numbers of the last layers, each tensor (B, S, ...); ``one2many`` is None where ``many_weight`` is 0.
    ``pixels``: (B, d, h, w) pixel features, None for heads without heatmaps.
    """

    tokens: Tensor
    grid: GridPoints
    shape: tuple[int, int]
    one2one: Raw
    one2many: Raw | None
    pixels: Tensor | None


ConfigT = TypeVar("ConfigT", bound=KeypointSettings)


class BaseKeypointHead(Head[ConfigT, KeypointOutputs]):
    """A dense head: every grid point predicts an object with its points.

    K is the largest number of keypoints that a class has; a class with fewer uses the first of them. Classes without
    keypoints are not predicted.

    Outputs for the N = ``num_instances`` grid points with the best scores: ``logits`` (B, N, C) before the sigmoid, C
    being the number of classes with keypoints; ``boxes`` (B, N, 4) cxcywh in 0..1; ``keypoints`` (B, N, K, 2) x, y in
    0..1; ``visibility`` (B, N, K), the logits of the points' scores. With heatmaps, which a subclass adds, there is
    also ``similarity`` (B, N, K) in 0..1, the expected similarity of every point; ``keypoints`` are then their places.

    Raises:
        UserError: no class has keypoints, or ``sigmas`` do not fit them.
    """

    needs = frozenset({"boxes", "keypoints"})
    evaluator = KeypointMetric
    more_evaluators = (BoxMetric,)
    kind = "poses"

    # Non-persistent buffers: they follow from the categories and are not in weights files.
    class_labels: Tensor  # (C,) int64: label of every predicted class
    sigmas: Tensor  # (categories, K)
    point_exists: Tensor  # (categories, K) bool: the class has this point

    def build(self) -> None:
        """See ``Head.build``."""
        config, width = self.config, self.config.embed_dim
        self.categories = _with_sigmas(self.categories, config.sigmas)
        self.num_points = max(len(category.keypoints) for category in self.classes)
        self._register_class_tables()
        levels = 1 if config.levels == "finest" else len(self.channels)
        # ``towers``, ``one`` (one-to-one), ``many`` (one-to-many) and ``maps`` are the names in weights files: they
        # have to stay.
        self.towers = nn.ModuleList(
            nn.Sequential(*(RepBlock(width if index else inside, width) for index in range(config.depth)))
            for inside in self.channels[:levels]
        )
        self.one = self.new_last_layers("one2one")
        self.many = self.new_last_layers("one2many") if config.many_weight else None
        self.maps: Heatmaps | None = None

    @abstractmethod
    def new_last_layers(self, branch: Branch) -> PoseLayers | PointLayers:
        """Last layers with new weights."""

    @abstractmethod
    def terms(self, branch: Branch, raw: Raw, assignment: Assignment, outputs: KeypointOutputs) -> dict[str, Tensor]:
        """The loss terms of one set of last layers, unweighted; the weight of a term is the setting ``TERM_weight``."""

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """The classes with keypoints."""
        return [category for category in categories if category.keypoints]

    def labels_of(self, branch: Branch) -> Tensor:
        """(C,) int64, the labels of the classes that a set of last layers predicts."""
        return self.class_labels

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | KeypointOutputs:
        """The best grid points of the neck's maps, or (with ``targets``, in training) all of them."""
        pixels = None if self.maps is None else self.maps.pixels(maps, lateral)
        maps = [tower(x) for tower, x in zip(self.towers, maps)]
        tokens, grid = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1), make_grid(maps)
        if targets is not None:
            shape = (maps[0].shape[-2], maps[0].shape[-1])
            one2one, one2many = self.one(tokens), None if self.many is None else self.many(tokens)
            return KeypointOutputs(tokens, grid, shape, one2one, one2many, pixels)
        # Boxes, points and heatmaps are computed for the grid points with the best scores alone.
        logits = self.one.rank(tokens)
        count = min(self.config.num_instances, tokens.shape[1])
        best = logits.max(-1).values.topk(count, dim=1).indices
        tokens = tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1]))
        logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
        boxes, points, visibility = decode(self.one(tokens), grid.at(best))
        outputs = {"logits": logits, "boxes": boxes, "visibility": visibility, "keypoints": points}
        if self.maps is not None and pixels is not None:
            heatmaps = self.maps.logits(self.maps.sample(pixels, boxes), tokens, boxes, points)
            sigmas = self.sigmas[self.class_labels[logits.argmax(-1)]]
            std = estimated_similarity_std(boxes, sigmas, (pixels.shape[-2], pixels.shape[-1]))
            places, outputs["similarity"] = best_places(heatmaps, boxes, std)
            outputs["keypoints"] = places.to(points.dtype)
        return outputs

    def loss(self, outputs: KeypointOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of ``terms`` for both sets of last layers, named ``TERM_one2one`` and ``TERM_one2many``."""
        weighted = {}
        for branch in BRANCHES:
            raw, weight = (outputs.one2one, 1.0) if branch == "one2one" else (outputs.one2many, self.config.many_weight)
            if raw is not None:
                assignment = self._assign(branch, raw, outputs, targets)
                for name, value in self.terms(branch, raw, assignment, outputs).items():
                    weighted[f"{name}_{branch}"] = weight * getattr(self.config, f"{name}_weight") * value
        return weighted

    def score_term(
        self, logits: Tensor, index: tuple[Tensor, ...], quality: Tensor, ignored: Tensor, labelled: Tensor | None
    ) -> Tensor:
        """Sum of the scores' loss over all grid points.

        Args:
            logits: (B, S, C) before the sigmoid.
            index: image, grid point and class of the P positives, each (P,).
            quality: (P,) in 0..1, their targets.
            ignored: (B, S) bool: grid points that are not negatives.
            labelled: ``labelled_classes`` of ``KeypointTargets``: grid points are no negatives of the other classes.
        """
        config = self.config
        loss = quality_focal(logits, index, quality, config.class_loss, config.alpha, config.gamma, labelled)
        ignored = ignored.index_put(index[:2], ignored.new_zeros(()))  # positives count anyway
        return torch.where(ignored[..., None], 0, loss).sum()

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The ``num_instances`` best (grid point, class) pairs of every image, in pixels of the original images.

        Points that the class of an instance does not have are zeros.
        """
        visibility = outputs["visibility"].float().sigmoid()
        all_scores = self.scores(outputs)
        scores, index = all_scores.flatten(1).topk(all_scores.shape[1], dim=1)
        corners = cxcywh_to_xyxy(outputs["boxes"].float()).clamp(0, 1)
        # Labelled points lie in the image, so moving predicted points into it cannot take them further away from these.
        points = torch.cat((outputs["keypoints"].float().clamp(0, 1), visibility[..., None]), -1)
        return [
            self._instances(corners[image], points[image], scores[image, keep], index[image, keep], size)
            for image, (keep, size) in enumerate(zip(scores >= threshold, sizes))
        ]

    def best_class_only(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Head.best_class_only``."""
        return {name: only_best_class(value) if name == "logits" else value for name, value in outputs.items()}

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, N, C) scores of the objects in 0..1."""
        return outputs["logits"].float().sigmoid()

    def _instances(
        self, corners: Tensor, points: Tensor, scores: Tensor, pairs: Tensor, size: tuple[int, int]
    ) -> Instances:
        """One image: ``corners`` (N, 4), ``points`` (N, K, 3); ``pairs`` index N x C (grid point, class) pairs."""
        classes, row = pairs % len(self.class_labels), pairs // len(self.class_labels)
        height, width = size
        points = points[row] * self.point_exists[self.class_labels[classes]][..., None].to(points)
        return Instances(
            boxes=(corners[row] * corners.new_tensor([width, height, width, height])).cpu().numpy(),
            scores=scores.cpu().numpy(),
            labels=self.class_labels[classes].cpu().numpy(),
            size=size,
            categories=self.categories,
            keypoints=(points * points.new_tensor([width, height, 1])).cpu().numpy(),
        )

    def _assign(self, branch: Branch, raw: Raw, outputs: KeypointOutputs, targets: list[Targets]) -> Assignment:
        """Compare the predictions of one set of last layers with the labels, and choose the positives."""
        grid = outputs.grid
        sigmas = self.sigmas.to(grid.centres.dtype)
        gt = keypoint_targets(targets, self.labels_of(branch), sigmas, self.point_exists, outputs.shape)
        grid_points, location_prior, inside = candidates(*grid, gt.boxes, 2 * self.config.top_k)
        at_candidates = raw.at((gt.image[:, None], grid_points))
        pred = decode(at_candidates, grid.at(grid_points))
        comparison = compare(pred, gt)
        scores = at_candidates.logits.gather(-1, gt.classes[:, None, None].expand(*grid_points.shape, 1)).squeeze(-1)
        scores = scores.to(gt.areas).sigmoid()
        alignment = compute_alignment(location_prior, scores, comparison.oks, comparison.iou, gt.is_labelled)
        if branch == "one2one":
            is_positive = assign_one2one(alignment, grid_points, gt.image)
        else:
            is_positive = assign_one2many(alignment, grid_points, gt.image, len(grid.centres), self.config.top_k)
        return Assignment(gt, grid_points, inside, pred, comparison, alignment, is_positive)

    def _register_class_tables(self) -> None:
        """Fill the buffers about the classes."""
        class_labels = torch.tensor([self.categories.index(category) for category in self.classes])
        sigmas = torch.ones(len(self.categories), self.num_points)
        point_exists = torch.zeros_like(sigmas, dtype=torch.bool)
        for label, category in enumerate(self.categories):
            own = len(category.keypoints)
            sigmas[label, :own] = torch.tensor(keypoint_sigmas(category))
            point_exists[label, :own] = True
        self.register_buffer("class_labels", class_labels, persistent=False)
        self.register_buffer("sigmas", sigmas, persistent=False)
        self.register_buffer("point_exists", point_exists, persistent=False)


def _with_sigmas(categories: list[Category], sigmas: list[float]) -> list[Category]:
    """The categories, checked, with the sigmas of the config (where it has any) in those that have keypoints."""
    classes = [category for category in categories if category.keypoints]
    if not classes:
        names = ", ".join(category.name for category in categories[:5])
        raise UserError(
            f"keypoints: none of the classes ({names}) has keypoints; name them in the categories of the annotations, "
            'such as "keypoints": ["nose", "tail"]'
        )
    if not sigmas:
        return categories
    for category in classes:
        if problem := check_sigmas(sigmas, len(category.keypoints)):
            raise UserError(
                f"model.heads.keypoints.sigmas: {problem} of class '{category.name}'; give one for each, or leave it "
                "empty for those of the data set (keypoint_sigmas of its categories)"
            )
    return [c.model_copy(update={"sigmas": list(sigmas)}) if c.keypoints else c for c in categories]
