"""Parts of the pose decoder that outputs of the originals do not show."""

from __future__ import annotations

import pytest
import torch

from mvision.heads.poses.decoder import PoseDecoder
from mvision.heads.poses.points import PointDistribution, boxes_around
from mvision.heads.poses.settings import PoseConfig
from tests.pose_inputs import SMALL, make_denoising

SHAPES = [(4, 50), (2, 25)]


def make_decoder(**settings: object) -> PoseDecoder:
    torch.manual_seed(0)
    return PoseDecoder(PoseConfig(**{**SMALL, **settings}), [16, 16], [3, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("every_layer", [False, True])
def test_features_of_tokens_at_the_border_do_not_matter(every_layer: bool) -> None:
    decoder = make_decoder().eval()
    memory = torch.randn(1, 250, 16)
    best = decoder.memory_class(decoder.memory_proj(memory)).amax(-1).argmax()
    changed = memory.clone()
    # The first column of the finest map, whose centres are at 0.01, gets the features with the best score.
    changed[:, 0:200:50] = memory[:, best, None]
    expected = decoder._select(memory, SHAPES, every_layer)
    for ours, theirs in zip(decoder._select(changed, SHAPES, every_layer), expected):
        torch.testing.assert_close(ours, theirs)


def test_a_new_decoder_predicts_the_centres_of_tokens() -> None:
    with torch.no_grad():
        found = make_decoder().eval()([torch.randn(1, 16, *shape) for shape in SHAPES])
    torch.testing.assert_close(found.points, found.points[..., :1, :].expand_as(found.points), rtol=0, atol=1e-6)
    place = found.points[0, 0, :, 0] * torch.tensor([50, 4]) - 0.5
    coarse = found.points[0, 0, :, 0] * torch.tensor([25, 2]) - 0.5
    distance = torch.minimum((place - place.round()).abs().amax(-1), (coarse - coarse.round()).abs().amax(-1))
    assert distance.max() < 1e-3


def test_points_are_the_means_of_distributions() -> None:
    distribution = PointDistribution(4, 4.0, 0.5)  # bins -4, -2, 0, 2, 4 quarters of the image
    corners = torch.full((1, 2, 5), -100.0)
    corners[0, 0, 3] = corners[0, 1, 2] = corners[0, 1, 1] = 100
    torch.testing.assert_close(distribution.points(corners, torch.tensor([[0.25, 0.5]])), torch.tensor([[0.75, 0.25]]))


def test_boxes_are_moved_and_scaled_extents() -> None:
    points = torch.tensor([[0.2, 0.2], [0.4, 0.6]])
    change = torch.tensor([0.5, 0.0, 0.0, 2.0]).log1p() * torch.tensor([0.0, 0, 1, 1]) + torch.tensor([0.5, 0, 0, 0])
    torch.testing.assert_close(boxes_around(points, change, None), torch.tensor([0.42, 0.4, 0.24, 1.44]))


def test_denoising_needs_its_embeddings() -> None:
    decoder = make_decoder(num_denoising=0)
    with pytest.raises(ValueError, match="num_denoising"):
        decoder([torch.randn(1, 16, *shape) for shape in SHAPES], make_denoising(3, 6), every_layer=True)
