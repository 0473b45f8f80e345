"""Settings of poses from queries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mvision.heads.keypoints.settings import PoseSettings
from mvision.heads.query.settings import Points
from mvision.settings import MAX_LAYERS, MAX_OBJECTS, MAX_WIDTH


class PoseConfig(PoseSettings):
    """Settings of ``QueryPoseHead``, and those of ``PoseSettings``. The defaults are those of DETRPose and ECPose, if
    not said otherwise.

    Attributes:
        queries: ``own``: instances are selected among the tokens of the feature maps; ``shared``: they are the queries
            of the head of instance-seg or detection in the same joint model, after its last layer, those with the best
            scores in classes with points. Each pose then belongs to an object, whose box it has.
        embed_dim: width of queries and memory. Shared queries have that of the other head, also where none is given.
        num_queries: largest number of objects that can be predicted in an image; without ``learned_queries`` it may be
            changed after training.
        learned_queries: point tokens start from a learned vector for each query, as in the published models, instead
            of the features of the selected tokens of the image.
        num_layers: decoder layers.
        num_heads, ffn_dim, dropout: of every decoder layer.
        num_points: sampled points per attention head and level, around each keypoint; one number, or one for each
            level.
        act: activation of the feed-forward networks and of all MLPs.
        num_bins, bin_scale, bin_reach: of the distributions of the points, see ``PointDistribution``; an even number of
            bins.
        visibility: predict which points are visible. The published models do not.
        num_denoising: denoising queries per image, about; 0 for none.
        label_noise: half of this share of them gets a random class.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        quality_power: scores are taught the OKS of the predicted points to this power. Below 1, poses that are nearly
            right count too: from random weights the OKS itself is close to 0 for so long that no score is learned.
        dense_weight: weight of the one-to-many supervision of all tokens, without which hardly anything is learned from
            random weights; 0 switches it off, as in the published models. Not for shared queries.
        shared_matches: the points and boxes of all layers are taught the union of all layers' matches.
        class_weight, point_weight, oks_weight, visible_weight, box_weight, giou_weight: of the loss terms: scores; L1
            distance of the points; one minus the OKS; visibility of the points; L1 distance and GIoU of the boxes. With
            shared queries the last two are of the matching costs alone.
        ddf_weight: of the distance of the earlier layers' distributions from those of the last one, see
            ``mvision.heads.query.fine_grained``; the published models are trained without.
    """

    kind: Literal["query"] = "query"
    queries: Literal["own", "shared"] = "own"
    embed_dim: int = Field(256, gt=0, le=MAX_WIDTH)
    num_queries: int = Field(60, gt=0, le=MAX_OBJECTS)
    learned_queries: bool = False
    num_layers: int = Field(3, ge=1, le=MAX_LAYERS)
    num_heads: int = Field(8, gt=0, le=MAX_WIDTH)
    ffn_dim: int = Field(1024, gt=0, le=8 * MAX_WIDTH)
    num_points: Points | list[Points] = 4
    dropout: float = Field(0.0, ge=0, lt=1)
    act: Literal["relu", "silu", "gelu"] = "relu"
    num_bins: int = Field(32, ge=4, le=1024, multiple_of=2)
    bin_scale: float = Field(4.0, gt=0, le=1e4)
    bin_reach: float = Field(0.5, gt=0, le=1e4)
    visibility: bool = True
    num_denoising: int = Field(20, ge=0, le=MAX_OBJECTS)
    label_noise: float = Field(0.5, ge=0, le=1)
    class_loss: Literal["vfl", "mal"] = "vfl"
    alpha: float = Field(0.25, ge=0)
    gamma: float = Field(2.0, ge=0)
    quality_power: float = Field(1.0, gt=0, le=4)
    dense_weight: float = Field(0.0, ge=0)
    shared_matches: bool = True
    class_weight: float = Field(2.0, ge=0)
    point_weight: float = Field(10.0, ge=0)
    oks_weight: float = Field(4.0, ge=0)
    visible_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    ddf_weight: float = Field(0.0, ge=0)
