"""Settings that both keypoint heads have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mvision.errors import UserError
from mvision.settings import MAX_LAYERS, MAX_OBJECTS, MAX_WIDTH, Replacement, Settings
from mvision.structures import Category
from mvision.structures.oks import check_sigmas

# Settings of ``KeypointConfig`` alone, which older weights files have for both kinds.
ONLY_DENSE = ("pixel_dim", "map_dim", "box_weight", "giou_weight", "visible_weight", "map_weight")


class PoseSettings(Settings):
    """Settings of every head for keypoints.

    Attributes:
        nms_iou: post-processing drops an object whose box has an IoU above this with that of a better one of its class,
            0..1. None keeps all.
        sigmas: of the OKS, one for each point, in place of those of the data set; for training and evaluation.
    """

    nms_iou: float | None = Field(None, gt=0, le=1)
    sigmas: list[float] = []


class KeypointSettings(PoseSettings):
    """Settings that both keypoint heads on a grid have, and those of ``PoseSettings``.

    Attributes:
        levels: ``all`` of the neck's maps, or the ``finest`` alone.
        depth: RepBlocks on each of them.
        own_depth: further RepBlocks on each of them that the one-to-one layers, which predict, have for themselves. In
            one-to-many training neighbours of an object's best grid point are positives too; layers that see the same
            features give them nearly the score of the best one.
        embed_dim: their width.
        num_instances: the largest number of objects predicted in an image; may be changed after training.
        top_k: positives per object in one-to-many training.
        many_weight: weight of one-to-many training relative to one-to-one; 0 leaves its layers out.
        class_loss: ``vfl`` (varifocal) or ``mal`` (matchability-aware), with ``alpha`` (vfl alone) and ``gamma``.
        class_weight, oks_weight, point_weight: of the loss terms: scores; one minus the OKS; L1 distance of the points
            divided by the root of the object's area.
    """

    levels: Literal["finest", "all"] = "all"
    depth: int = Field(2, ge=1, le=MAX_LAYERS)
    own_depth: int = Field(0, ge=0, le=MAX_LAYERS)
    embed_dim: int = Field(64, gt=0, le=MAX_WIDTH)
    num_instances: int = Field(100, gt=0, le=MAX_OBJECTS)
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


def with_sigmas(categories: list[Category], sigmas: list[float]) -> list[Category]:
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
