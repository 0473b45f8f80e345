"""The classes of a COCO file: ids, names and keypoints, checked."""

from __future__ import annotations

from typing import Any

from mvision.data.formats.points import add_sigmas_and_pairs, skeleton
from mvision.errors import UserError
from mvision.structures import Category


def read_categories(raw: dict[str, Any], where: str) -> list[Category]:
    """The categories of a COCO dictionary by rising id, with names for keypoints that have none.

    Args:
        where: the file, for errors.

    Raises:
        UserError: none, an id or a name that is missing or occurs twice, or keypoint sigmas or flip pairs that do not
            fit the keypoints.
    """
    categories: dict[int, Category] = {}
    for number, entry in enumerate(raw["categories"]):
        identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if identity is None:
            raise UserError(f"{where}: categories[{number}] has no whole number as id: {entry!r}")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: category {identity} has no name")
        if identity in categories:
            raise UserError(f"{where}: category id {identity} occurs twice ('{categories[identity].name}', '{name}')")
        twin = next((known.id for known in categories.values() if known.name == name), None)
        if twin is not None:
            raise UserError(f"{where}: categories {twin} and {identity} are both named '{name}'; rename or merge them")
        keypoints = [str(point) for point in entry.get("keypoints") or []]
        categories[identity] = Category(
            id=identity, name=name, keypoints=keypoints, skeleton=skeleton(entry.get("skeleton"), len(keypoints))
        )
    if not categories:
        raise UserError(f"{where}: no categories: every class needs an entry with id and name")
    _name_unnamed_keypoints(raw, categories)
    add_sigmas_and_pairs(raw, categories, where)
    _drop_roboflow_parent(raw, categories)
    return [categories[identity] for identity in sorted(categories)]


def _name_unnamed_keypoints(raw: dict[str, Any], categories: dict[int, Category]) -> None:
    """Some exporters write keypoints without naming them in the category: they get numbers."""
    unnamed = {identity for identity, category in categories.items() if not category.keypoints}
    for annotation in raw["annotations"]:
        if not unnamed:
            return
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        identity = whole_number(annotation.get("category_id")) if points else None
        if identity in unnamed and isinstance(points, list) and len(points) % 3 == 0:
            category = categories[identity]
            names = [f"point_{index}" for index in range(len(points) // 3)]
            categories[identity] = category.model_copy(update={"keypoints": names})
            unnamed.discard(identity)


def _drop_roboflow_parent(raw: dict[str, Any], categories: dict[int, Category]) -> None:
    """Roboflow's exports begin with an unused category 0 that is the parent of all the others; it is no class."""
    parents = {whole_number(entry.get("id")): entry.get("supercategory") for entry in raw["categories"]}
    others = [identity for identity in categories if identity != 0]
    if 0 not in categories or parents[0] != "none" or not others:
        return
    if any(parents[identity] != categories[0].name for identity in others):
        return
    if any(isinstance(entry, dict) and whole_number(entry.get("category_id")) == 0 for entry in raw["annotations"]):
        return
    del categories[0]


def category_difference(here: list[Category], there: list[Category]) -> str:
    """Up to five classes (id and name) that only one of two lists has, as text."""
    ours, theirs = {(c.id, c.name) for c in here}, {(c.id, c.name) for c in there}
    sides = [
        f"{word} {', '.join(f'{id}:{name}' for id, name in sorted(entries)[:5])}"
        for word, entries in (("only here", ours - theirs), ("only there", theirs - ours))
        if entries
    ]
    return "; ".join(sides)


def whole_number(value: Any) -> int | None:
    """Ids as whole numbers; some files write them as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return None
