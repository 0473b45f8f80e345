"""The head for poses from queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvision.heads.base import ObjectQueries
from mvision.heads.keypoints.results import PoseResults
from mvision.heads.poses.decoder import Objects, PoseDecoder
from mvision.heads.poses.losses import pose_terms
from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.poses.targets import PoseTargets, pose_targets
from mvision.heads.query.anchors import box_dtype
from mvision.structures import Targets
from mvision.structures.transfer import to_host

ALL_VISIBLE = 100.0
"""Logit of points of which nothing is predicted: a score of 1."""


class PoseOutputs(NamedTuple):
    """Training outputs: those of the decoder, and the ground truth, which the loss needs again."""

    decoded: Decoded
    targets: PoseTargets


class QueryPoseHead(PoseResults[PoseConfig, PoseOutputs]):
    """Objects with their points from the queries of ``PoseDecoder``; outputs are those of ``PoseResults``.

    With ``queries: shared`` there is one more, ``query`` (B, N) int64: the index of every instance among the queries of
    the other head. Without ``config.visibility`` all points are visible.
    """

    Config = PoseConfig
    class_labels: Tensor  # (C,) int64, see ``labels_of_classes``; not in weights files

    def build(self) -> None:
        """See ``Head.build``."""
        self.read_classes(self.config.sigmas)
        counts = [len(category.keypoints) for category in self.classes]
        self.decoder = PoseDecoder(self.config, self.channels, counts)
        self.register_buffer("class_labels", torch.from_numpy(self.labels_of_classes), persistent=False)

    @classmethod
    def takes_queries_of(cls, config: PoseConfig, query_dims: Mapping[str, int | None]) -> str | None:
        """See ``Head.takes_queries_of``: with ``queries: shared`` the first head with queries."""
        if config.queries == "own":
            return None
        task = next((task for task, dim in query_dims.items() if dim is not None), None)
        if task is None:
            raise ValueError(
                "queries: shared needs another head with queries in the same model; add --task instance-seg or --task "
                "detection, or set it to own"
            )
        if query_dims[task] != config.embed_dim:
            raise ValueError(
                f"embed_dim {config.embed_dim}: queries: shared needs that of model.heads.{task}, {query_dims[task]}"
            )
        return task

    def forward(
        self,
        maps: list[Tensor],
        lateral: Tensor | None = None,
        targets: list[Targets] | None = None,
        queries: ObjectQueries | None = None,
    ) -> dict[str, Tensor] | PoseOutputs:
        """See ``Head.forward`` and ``Head.takes_queries_of``."""
        index = objects = None
        if queries is not None:
            index, objects = self._objects(queries)
        if targets is not None:
            tokens = sum(x.shape[-2] * x.shape[-1] for x in maps)
            count = min(self.config.num_queries, tokens) if index is None else index.shape[1]
            found = self._targets(maps, targets, count)
            return PoseOutputs(self.decoder(maps, found.denoising, every_layer=True, objects=objects), found)
        decoded = self.decoder(maps, objects=objects)
        points = decoded.points[0]
        visibility = decoded.visibility
        outputs = {
            "logits": decoded.logits[0],
            "boxes": decoded.boxes[0],
            "visibility": torch.full_like(points[..., 0], ALL_VISIBLE) if visibility is None else visibility[0],
            "keypoints": points,
        }
        return outputs if index is None else {**outputs, "query": index}

    def points_of_queries(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """See ``Head.points_of_queries``."""
        host = to_host({"query": outputs["query"], "points": self.points(outputs)})
        images = zip(host["query"].numpy(), host["points"].numpy(), sizes)
        return [(query, points * np.array([width, height, 1], np.float32)) for query, points, (height, width) in images]

    def _objects(self, queries: ObjectQueries) -> tuple[Tensor, Objects]:
        """The ``num_queries`` queries with the best scores in classes with points: their indices, and what they are."""
        logits = queries.logits.detach()
        if len(self.class_labels) < logits.shape[-1]:
            logits = logits.index_select(-1, self.class_labels)
        index = logits.amax(-1).topk(min(self.config.num_queries, logits.shape[1]), dim=1).indices
        row = index.unsqueeze(-1)
        features, boxes = (part.gather(1, row.expand(-1, -1, part.shape[-1])) for part in queries[:2])
        return index, Objects(features, boxes)

    def loss(self, outputs: PoseOutputs, targets: list[Targets]) -> dict[str, Tensor]:
        """See ``pose_terms``."""
        weights = None if self.class_weights is None else self.class_weights.index_select(0, self.class_labels)
        return pose_terms(outputs.decoded, outputs.targets, self.config, weights)

    def _targets(self, maps: list[Tensor], targets: list[Targets], num_queries: int) -> PoseTargets:
        config, finest = self.config, maps[0]
        return pose_targets(
            targets,
            self.labels_of_classes.tolist(),
            self.tables,
            shape=(finest.shape[-2], finest.shape[-1]),
            like=finest.new_empty(0, dtype=box_dtype(finest)),
            num_queries=num_queries,
            num_layers=config.num_layers + 1,  # that of "pre"
            num_denoising=config.num_denoising,
            label_noise=config.label_noise,
        )
