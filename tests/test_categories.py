"""Ids of classes."""

from pathlib import Path

from mvision.data.formats.categories import extend_categories
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.structures import Category
from tests.coco_files import annotation, coco, write_set

LARGEST = 2**63 - 1


def test_ids_of_64_bits(tmp_path: Path) -> None:
    """Some tools number classes by hashes."""
    identity = 9007199254740993  # one that a float would round
    write_set(tmp_path, coco([annotation(category_id=identity)], [{"id": identity, "name": "cat"}]))
    assert CocoSplit(find_layout(tmp_path).split("train")).categories[0].id == identity


def test_an_id_that_is_taken_is_replaced_by_a_free_one() -> None:
    def extended(*identities: int) -> list[int]:
        given = [Category(id=identity, name=str(number)) for number, identity in enumerate(identities)]
        return [category.id for category in extend_categories(given, [Category(id=identities[0], name="new")])]

    assert extended(3, 8) == [3, 8, 9]
    assert extended(LARGEST, 1) == [LARGEST, 1, 2]
