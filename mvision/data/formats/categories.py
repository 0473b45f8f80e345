"""The classes of a COCO file: ids, names and keypoints, checked."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import count
from typing import Any

from mvision.data.formats.numbers import LARGEST, whole_number
from mvision.data.formats.points import add_sigmas_and_pairs, skeleton, unnamed_points
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
    entries = _without_roboflow_parent(_entries(raw["categories"], where), raw["annotations"])
    categories: dict[int, Category] = {}
    for identity, entry in entries:
        name = entry["name"]
        same = categories.get(identity)
        if same is not None and same.name == name and same.keypoints == _point_names(entry, where):
            continue  # listed twice
        if same is not None:
            raise UserError(f"{where}: category id {identity} occurs twice ('{same.name}', '{name}')")
        twin = next((known.id for known in categories.values() if known.name == name), None)
        if twin is not None:
            raise UserError(f"{where}: categories {twin} and {identity} are both named '{name}'; rename or merge them")
        points = _point_names(entry, where)
        lines = skeleton(entry.get("skeleton"), len(points))
        categories[identity] = Category(id=identity, name=name, keypoints=points, skeleton=lines)
    if not categories:
        raise UserError(f"{where}: no categories: every class needs an entry with id and name")
    _name_unnamed_keypoints(raw, categories)
    add_sigmas_and_pairs(raw, categories, where)
    return [categories[identity] for identity in sorted(categories)]


def extend_categories(given: Sequence[Category], own: Sequence[Category]) -> list[Category]:
    """``given``, and after them the classes of ``own`` whose names are not among them, with ids that are free."""
    names, used = {category.name for category in given}, {category.id for category in given}
    extended = list(given)
    for category in own:
        if category.name not in names:
            identity = free_id(category.id, used)
            used.add(identity)
            extended.append(category.model_copy(update={"id": identity}))
    return extended


def free_id(wanted: int, used: Set[int]) -> int:
    """``wanted``, or where it is taken one above all others; below them where those are as large as 64 bits allow."""
    if wanted not in used:
        return wanted
    return max(used) + 1 if max(used) < LARGEST else next(number for number in count(1) if number not in used)


def _entries(categories: list[Any], where: str) -> list[tuple[int, dict[str, Any]]]:
    """Ids and entries, with names."""
    entries = []
    for number, entry in enumerate(categories):
        identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None:
            raise UserError(f"{where}: categories[{number}] has no whole number as id: {entry!r:.200}")
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: category {identity} has no name")
        if any("\ud800" <= character <= "\udfff" for character in name):  # which no file in UTF-8 can hold
            raise UserError(
                f"{where}: category {identity} has half a character in its name, {name!a}, as where a text was cut "
                "within an emoji; rename it"
            )
        entries.append((identity, entry))
    return entries


def _without_roboflow_parent(
    entries: list[tuple[int, dict[str, Any]]], annotations: list[Any]
) -> list[tuple[int, dict[str, Any]]]:
    """Roboflow's exports begin with an unused category 0 that is the parent of all the others; it is no class.

    It may have the name of a class: that of a project which is called like its only class.
    """
    parents = [entry for identity, entry in entries if identity == 0]
    others = [entry for identity, entry in entries if identity != 0]
    if len(parents) != 1 or parents[0].get("supercategory") != "none" or not others:
        return entries
    if any(entry.get("supercategory") != parents[0]["name"] for entry in others):
        return entries
    if any(isinstance(entry, dict) and whole_number(entry.get("category_id")) == 0 for entry in annotations):
        return entries
    return [(identity, entry) for identity, entry in entries if identity != 0]


def _point_names(entry: dict[str, Any], where: str) -> list[str]:
    names = entry.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"{where}: keypoints of category '{entry['name']}' has to be a list of names: {names!r:.80}")
    return [str(name) for name in names]


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
            names = unnamed_points(len(points) // 3)
            categories[identity] = category.model_copy(update={"keypoints": names})
            unnamed.discard(identity)
