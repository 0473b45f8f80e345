"""Run lengths: the same as pycocotools', the exact inverse of resizing, and small whatever the image."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from mvision.structures.masks import Masks, decode_mask, encode_logits, encode_mask, mask_polygons
from mvision.structures.run_lengths import MAX_PIXELS, encode_labels, encode_masks


def blobs(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random smooth shapes, some of them with holes."""
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, 5, 6)))
    return (F.interpolate(coarse, shape, mode="bicubic")[0, 0] > 0.2).numpy()


def test_an_array_goes_in_and_comes_out() -> None:
    array = np.stack([blobs((40, 50), seed) for seed in range(4)])
    masks = Masks.from_array(array)
    assert masks.shape == array.shape
    assert masks.dtype == bool
    assert np.array_equal(masks, array)
    assert np.array_equal(masks[2], array[2])
    assert masks[-1].dtype == bool
    assert np.array_equal(masks[1:3], array[1:3])
    assert np.array_equal(masks[np.array([3, 0])], array[[3, 0]])
    assert np.array_equal(masks[np.array([False, True, False, True])], array[[1, 3]])
    assert all(np.array_equal(a, b) for a, b in zip(masks, array))
    assert masks.areas.tolist() == array.sum(axis=(1, 2)).tolist()
    assert Masks.from_array(np.ones((300, 2, 3), bool)).areas.tolist() == [6] * 300
    assert len(Masks([], (40, 50))) == 0
    assert np.asarray(Masks([], (40, 50))).shape == (0, 40, 50)
    assert Masks([], (40, 50)).areas.shape == (0,)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (48, 64), (333, 517), (20, 900)])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (24, 16)])
def test_logits_are_enlarged_as_torch_does(size: tuple[int, int], grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size) + sum(grid))
    for shift in (-3.0, -1.0, 0.0, 3.0):  # from empty masks to full ones
        logits = (rng.normal(size=grid) + shift).astype(np.float32)
        enlarged = F.interpolate(torch.from_numpy(logits)[None, None], size, mode="bilinear", align_corners=False)
        assert encode_logits(logits, size) == encode_mask((enlarged[0, 0] > 0).numpy())


@pytest.mark.parametrize("at_once", [1, 20_000, 2**26])
def test_a_gpus_masks_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Masks of images of several sizes, in any order; empty and full ones, and one that is asked for twice."""
    monkeypatch.setitem(MAX_PIXELS, "cpu", at_once)
    logits = torch.from_numpy(np.stack([blobs((24, 16), seed) - np.float32(0.4) for seed in range(8)]))
    logits[3], logits[4] = -1, 1
    which = np.array([3, 1, 4, 2, 0, 5, 6, 7, 3])
    sizes = [(100, 77), (7, 5), (100, 77), (48, 64), (7, 5), (100, 77), (24, 16), (48, 64), (48, 64)]
    expected = [encode_logits(logits[index].numpy(), size) for index, size in zip(which, sizes)]
    assert encode_masks(logits, which, sizes) == expected
    assert encode_masks(logits, which[:0], []) == []


def test_maps_of_labels_are_encoded_number_by_number() -> None:
    maps = torch.randint(0, 4, (3, 50, 60), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    maps[1], maps[2, :, 0] = 2, maps[1, -1, -1]  # one number everywhere, with which the next map begins
    stacks = [maps[:, :30], maps[1:]]
    for stack, encoded in zip(stacks, encode_labels(stacks)):
        for labels, found in zip(stack, encoded):
            assert list(found) == labels.unique().tolist()
            for number, runs in found.items():
                assert runs == encode_mask((labels == number).numpy())
    assert encode_labels([]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_run_lengths_on_a_gpu() -> None:
    logits = torch.from_numpy(np.stack([blobs((160, 160), seed) - np.float32(0.4) for seed in range(40)]))
    which, sizes = np.arange(40), [(480, 640), (333, 517)] * 20
    found = encode_masks(logits.cuda(), which, sizes)
    for index, size, runs in zip(which, sizes, found):
        other = decode_mask(encode_logits(logits[index].numpy(), size))
        assert (decode_mask(runs) != other).mean() < 1e-4
    maps = torch.randint(0, 4, (3, 50, 60), dtype=torch.int32)
    assert encode_labels([maps.cuda()]) == encode_labels([maps])


def test_a_small_object_on_a_large_image_needs_little_memory() -> None:
    logits = np.full((750, 1000), -4.0, np.float32)
    logits[300:310, 500:520] = 3.0
    tracemalloc.start()
    rle = encode_logits(logits, (3000, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert coco_mask.area(rle) == pytest.approx(40 * 80, rel=0.1)
    assert peak < 3e6  # the mask itself would take 12 MB


def test_polygons_draw_the_mask_again() -> None:
    for seed in range(6):
        mask = blobs((60, 80), seed)
        polygons = mask_polygons(mask)
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([p.ravel() for p in polygons], 60, 80)))
        assert (drawn.astype(bool) & mask).sum() / mask.sum() > 0.99
        assert all(polygon.min() >= 0 and (polygon <= (80, 60)).all() for polygon in polygons)


def test_polygons_leave_out_holes_and_keep_parts() -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:15, 5:15] = True
    mask[8:12, 8:12] = False
    mask[20:28, 30:40] = True
    polygons = mask_polygons(mask)
    assert sorted(np.ptp(polygon, axis=0).tolist() for polygon in polygons) == [[10, 8], [10, 10]]
    assert mask_polygons(np.zeros((4, 4), bool)) == []
    assert [len(parts) for parts in Masks.from_array(mask[None]).polygons()] == [2]


def test_decoding_takes_bytes_too() -> None:
    mask = blobs((13, 17))
    assert np.array_equal(decode_mask(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))), mask)
