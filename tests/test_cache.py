"""Memory for decoded images: only where there are pictures, whatever the annotations claim."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mvision.data.formats.coco import ImageRecord
from mvision.data.loading import cache as module
from mvision.data.loading.cache import is_small, make_cache


def records(*sizes: tuple[int, int]) -> list[ImageRecord]:
    return [ImageRecord(number, f"{number}.png", *size) for number, size in enumerate(sizes)]


def test_one_impossible_size_does_not_cost_the_cache() -> None:
    pictures = records((4, 5), (400_000, 400_000), (1, 1))
    assert is_small(pictures)
    cache = make_cache(pictures)
    assert cache is not None
    assert len(cache.pixels) == 4 * 5 * 3 + 3
    for index, (height, width) in enumerate([(4, 5), (6, 7), (1, 1)]):
        cache.put(index, np.full((height, width, 3), index, np.uint8))
    assert cache.get(1) is None
    for index in (0, 2):
        image = cache.get(index)
        assert image is not None
        assert (image == index).all()


def test_missing_pictures_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = records((10, 10), (100, 100), (100, 100))
    monkeypatch.setattr(module, "_budget", lambda: 1000)
    monkeypatch.setattr(module, "SMALL", 1000)
    monkeypatch.setattr(module, "ORDINARY", 300)
    assert make_cache(pictures) is None
    assert not is_small(pictures)
    cache = make_cache(pictures, missing={1, 2})
    assert cache is not None
    assert len(cache.pixels) == 300
    assert is_small(pictures, missing={1, 2})
    cache.put(1, np.zeros((100, 100, 3), np.uint8))  # it was there after all: read again each time
    assert cache.get(1) is None


def test_no_pictures() -> None:
    cache = make_cache([])
    assert cache is not None
    assert len(cache.pixels) == 0


def test_large_sets_of_ordinary_pictures_are_kept_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo of 12 megapixels is decoded at a part of its size in a large set, with and without memory for it."""
    monkeypatch.setattr(module, "SMALL", 1000)
    monkeypatch.setattr(module, "ORDINARY", 300)
    ordinary, photos = records(*[(10, 10)] * 5), records(*[(20, 20)] * 5)
    monkeypatch.setattr(module, "_budget", lambda: 10_000)
    assert is_small(ordinary)
    assert make_cache(ordinary) is not None
    assert not is_small(photos)
    assert make_cache(photos) is None
    monkeypatch.setattr(module, "_budget", lambda: 1400)
    assert is_small(ordinary)
    assert make_cache(ordinary) is None


def test_the_cache_grows_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARED_MEMORY", Path("/no/such/folder"))
    monkeypatch.setattr(module, "CGROUP_LIMIT", Path("/no/such/file"))
    for gigabytes, expected in ((8, 2), (64, 16), (1000, 32)):
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda n=gigabytes: SimpleNamespace(available=n << 30))
        assert module._budget() == expected << 30
