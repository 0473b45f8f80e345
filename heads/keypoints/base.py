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
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mvision.heads.keypoints.assignment import assign_one2many, candidates, compute_alignment, start_one2one
from mvision.heads.keypoints.grid import GridPoints, PointLayers, PoseLayers, Raw, decode, make_grid, raw_at
from mvision.heads.keypoints.heatmaps import Heatmaps, best_places, estimated_similarity_std
from mvision.heads.keypoints.losses import Candidates, compare, ignored_grid_points, map_term, sums_by_set
from mvision.heads.keypoints.results import PoseResults
from mvision.heads.keypoints.settings import KeypointSettings
from mvision.heads.keypoints.targets import KeypointTargets, keypoint_targets
from mvision.heads.query.losses import quality_focal
from mvision.heads.query.matching import mean_over_processes
from mvision.neck.cached import ShapeCache
from mvision.neck.layers import RepBlock
from mvision.structures import Targets

Branch = Literal["one2one", "one2many"]
BRANCHES: tuple[Branch, ...] = ("one2one", "one2many")


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


class BaseKeypointHead(PoseResults[ConfigT, KeypointOutputs]):
    """A dense head: every grid point predicts an object with its points. Classes and K: see ``PoseResults``.

    Outputs for the N = ``num_instances`` grid points with the best scores: ``logits`` (B, N, C) before the sigmoid, C
    being the number of classes with keypoints; ``boxes`` (B, N, 4) cxcywh in 0..1; ``keypoints`` (B, N, K, 2) x, y in
    0..1; ``visibility`` (B, N, K), the logits of the points' scores. With heatmaps, which a subclass adds, there is
    also ``similarity`` (B, N, K) in 0..1, the expected similarity of every point; ``keypoints`` are then their places.

    Raises:
        UserError: no class has keypoints, or ``sigmas`` do not fit them.
    """

    # Non-persistent buffers: they follow from the categories and are not in weights files.
    class_labels: Tensor  # (C,) int64: label of every predicted class
    sigmas: Tensor  # (categories, K)

    def build(self) -> None:
        """See ``Head.build``."""
        config, width = self.config, self.config.embed_dim
        self.read_classes(config.sigmas)
        labels = torch.tensor(self.labels_of_classes.tolist())  # not from_numpy: without data on the meta device
        self.register_buffer("class_labels", labels, persistent=False)
        self.register_buffer("sigmas", torch.from_numpy(self.tables.sigmas.copy()), persistent=False)
        levels = 1 if config.levels == "finest" else len(self.channels)
        # ``towers``, ``own``, ``one`` (one-to-one), ``many`` (one-to-many) and ``maps`` are the names in weights files:
        # they have to stay.
        self.towers = nn.ModuleList(
            nn.Sequential(*(RepBlock(width if index else inside, width) for index in range(config.depth)))
            for inside in self.channels[:levels]
        )
        self.own = nn.ModuleList(
            nn.Sequential(*(RepBlock(width, width) for _ in range(config.own_depth)))
            for _ in range(levels if config.own_depth else 0)
        )
        self.one = self.new_last_layers("one2one")
        self.many = self.new_last_layers("one2many") if config.many_weight else None
        self.maps: Heatmaps | None = None
        self._grids = ShapeCache()

    @abstractmethod
    def new_last_layers(self, branch: Branch) -> PoseLayers | PointLayers:
        """Last layers with new weights."""

    @abstractmethod
    def losses(self, found: Candidates) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of all candidates, each (M, n), unweighted: first those of points, then the others."""

    @abstractmethod
    def score_targets(self, found: Candidates, is_scored: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The indices of scores (image, grid point, column of ``score_logits``), their targets, and which are counted.

        Args:
            is_scored: (M, n) bool: the candidate is a positive for the score.

        Returns:
            Tensors that can be broadcast to (M, n, ...), each of the full length in the first dimension.
        """

    @abstractmethod
    def score_logits(self, raw: Raw) -> Tensor:
        """(B, S, *) the scores that are learned, before the sigmoid."""

    def labels_of(self, branch: Branch) -> Sequence[int]:
        """The labels of the C classes that a set of last layers predicts."""
        return self.labels_of_classes.tolist()

    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | KeypointOutputs:
        """The best grid points of the neck's maps, or (with ``targets``, in training) all of them."""
        pixels = None if self.maps is None else self.maps.pixels(maps, lateral)
        maps = [tower(x) for tower, x in zip(self.towers, maps)]
        grid = self._grid(maps)
        tokens = _tokens([block(x) for block, x in zip(self.own, maps)] if len(self.own) else maps)
        if targets is not None:
            shape = (maps[0].shape[-2], maps[0].shape[-1])
            one2one, one2many = self.one(tokens), None if self.many is None else self.many(_tokens(maps))
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
        """Terms of both sets of last layers, named ``TERM_one2one`` and ``TERM_one2many``.

        Terms are divided by the number of positives, those of points by that of objects whose class has points, over
        all processes. Objects without labelled points count too: the weight of a label must not depend on how many are
        missing.
        """
        raws = [raw for raw in (outputs.one2one, outputs.one2many) if raw is not None]
        found = self._candidates(raws, outputs, targets)
        gt, first = found.gt, found.gt.sizes[0]
        one2one = start_one2one(found.alignment[:first], found.grid_points[:first], gt.counts)
        # Before the matching is waited for: everything that does not need it, so that a GPU has work meanwhile.
        is_positive = [self._one2many(found, outputs)] if len(raws) > 1 else []
        of_points, of_objects = self._weighted_losses(found)
        ignored = ignored_grid_points(found)
        of_maps = None
        if self.maps is not None and outputs.pixels is not None:
            of_maps = self._weight("map") * map_term(self.maps, outputs.pixels, outputs.tokens, found)

        positive = torch.cat((one2one(), *is_positive))
        factors = self._factors(positive, gt)
        pose_sums = sums_by_set(of_points, positive & gt.is_labelled[:, None], gt.sizes)
        object_sums = sums_by_set(of_objects, positive, gt.sizes)
        scores = self._score_terms(raws, found, positive, ignored)
        terms: dict[str, Tensor] = {}
        for index, (branch, factor) in enumerate(zip(BRANCHES, factors)):
            by_objects, by_poses = factor.unbind()
            own = {name: by_poses * value for name, value in pose_sums[index].items()}
            own["class"] = by_objects * scores[index]
            own |= {name: by_objects * value for name, value in object_sums[index].items()}
            if of_maps is not None and branch == "one2one":
                own["map"] = of_maps
            terms |= {f"{name}_{branch}": value for name, value in own.items()}
        return terms

    @property
    def scores_of_object(self) -> int:
        """Scores that a grid point has for one object; their loss is a mean over them."""
        return 1

    def score_term(
        self,
        logits: Tensor,
        index: tuple[Tensor, ...],
        quality: Tensor,
        counted: Tensor,
        ignored: Tensor | None,
        labelled: Tensor | None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Sum of the scores' loss over all grid points, divided by ``scores_of_object``.

        Args:
            logits: (B, S, C) before the sigmoid.
            index: image, grid point and class of P scores, tensors that can be broadcast to one shape.
            quality: in 0..1, their targets, in that shape.
            counted: bool, in that shape: which of them are positives.
            ignored: (B, S) bool: grid points that are not negatives; None: no grid point.
            labelled: ``labelled_classes`` of ``KeypointTargets``: grid points are no negatives of the other classes.
            class_weights: (C,) of positives, see ``quality_focal``.
        """
        config = self.config
        if labelled is not None:
            labelled = labelled[:, None]
        settings = config.class_loss, config.alpha, config.gamma
        loss = quality_focal(logits, index, quality, *settings, labelled, counted, class_weights)
        if ignored is not None:
            # Positives count anyway. What is no positive is written behind the end.
            place = torch.where(counted, torch.add(index[1], index[0], alpha=ignored.shape[1]), ignored.numel())
            kept = torch.cat((ignored.flatten(), ignored.new_zeros(1))).index_fill(0, place.flatten(), False)
            loss = torch.where(kept[:-1].view(ignored.shape)[..., None], 0, loss)
        return loss.sum() if self.scores_of_object == 1 else loss.sum() / self.scores_of_object

    def _grid(self, maps: list[Tensor]) -> GridPoints:
        first = maps[0]
        key = (tuple(x.shape[-2:] for x in maps), first.dtype, first.device)
        return GridPoints(*self._grids.get(key, partial(make_grid, maps)))

    def _candidates(self, raws: list[Raw], outputs: KeypointOutputs, targets: list[Targets]) -> Candidates:
        """Compare the predictions of the sets of last layers with the labels."""
        grid = outputs.grid
        predicted = [self.labels_of(branch) for branch, _ in zip(BRANCHES, raws)]
        gt = keypoint_targets(targets, predicted, self.tables, outputs.shape, grid.centres)
        grid_points, location_prior, inside = candidates(*grid, gt.boxes, 2 * self.config.top_k)
        rows = torch.add(grid_points, gt.image[:, None], alpha=len(grid.centres))
        raw = raw_at(raws, rows, gt.classes, gt.sizes)
        pred = decode(raw, grid.at(grid_points))
        comparison = compare(pred, gt)
        scores = raw.logits.squeeze(-1).to(gt.areas).sigmoid()
        alignment = compute_alignment(location_prior, scores, comparison.oks, comparison.iou, gt.is_labelled)
        return Candidates(gt, grid_points, inside, pred, comparison, alignment)

    def _one2many(self, found: Candidates, outputs: KeypointOutputs) -> Tensor:
        """The positives of the second set."""
        alignment, grid_points, image = (
            values[found.gt.sizes[0] :] for values in (found.alignment, found.grid_points, found.gt.image)
        )
        batch, num_grid_points = outputs.one2one.logits.shape[:2]
        return assign_one2many(alignment, grid_points, image, batch, num_grid_points, self.config.top_k)

    def _weighted_losses(self, found: Candidates) -> list[dict[str, Tensor]]:
        """Those of ``losses``, with the weights of the config."""
        return [{name: self._weight(name) * value for name, value in part.items()} for part in self.losses(found)]

    def _weight(self, term: str) -> float:
        return getattr(self.config, f"{term}_weight")

    @torch.no_grad()
    def _factors(self, is_positive: Tensor, gt: KeypointTargets) -> list[Tensor]:
        """What the sums of every set are multiplied by, each (2,): those of objects, and those of points."""
        objects = is_positive.sum(1)
        both = torch.stack((objects, torch.where(gt.class_has_points, objects, 0)))
        counts = torch.stack([part.sum(1) for part in both.split(gt.sizes, 1)]).to(gt.areas)
        weights = (1.0, self.config.many_weight)
        return [weight / count for weight, count in zip(weights, mean_over_processes(counts).clamp(min=1))]

    def _score_terms(
        self, raws: list[Raw], found: Candidates, is_positive: Tensor, ignored: Tensor | None
    ) -> list[Tensor]:
        """The weighted loss of the scores of every set, summed."""
        gt = found.gt
        # An object without labelled points is no positive for the score, unless its class has no points at all.
        is_scored = is_positive & (gt.is_labelled | ~gt.class_has_points)[:, None]
        index, quality, counted = self.score_targets(found, is_scored)
        parts = zip(*(values.split(gt.sizes) for values in (quality, counted, *index)))
        return [
            self._weight("class")
            * self.score_term(self.score_logits(raw), tuple(own), own_quality, own_counted, ignored, labelled, weights)
            for raw, labelled, (own_quality, own_counted, *own), weights in zip(
                raws, gt.labelled_classes, parts, map(self.weights_of, BRANCHES)
            )
        ]

    def weights_of(self, branch: Branch) -> Tensor | None:
        """``class_weights`` of the classes that a set of last layers predicts."""
        if self.class_weights is None or len(self.labels_of(branch)) == len(self.class_weights):
            return self.class_weights
        return self.class_weights.index_select(0, self.class_labels)


def _tokens(maps: list[Tensor]) -> Tensor:
    """(B, S, C) of maps (B, C, h, w), in the order of ``make_grid``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
