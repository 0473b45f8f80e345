"""Keypoints in a COCO file apart from their positions: names, skeleton, sigmas, pairs of left and right.

COCO's format has names and skeleton in the category. Beyond it, a category may hold ``keypoint_sigmas`` (or ``sigmas``)
and ``flip_pairs``; ``info`` may hold ``keypoint_sigmas`` and ``flip_pairs`` for all classes that they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from mvision.data.formats.numbers import numbers, whole_number
from mvision.errors import UserError
from mvision.structures import Category
from mvision.structures.oks import check_sigmas


def skeleton(pairs: Any, count: int) -> list[tuple[int, int]]:
    """Lines between ``count`` keypoints as 0-based pairs, without those whose ends do not exist.

    COCO counts keypoints from 1 here. Where the number 0 occurs, the file counts from 0.
    """
    if not isinstance(pairs, list):
        return []
    whole = [
        (int(pair[0]), int(pair[1]))
        for pair in pairs
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(end, int) for end in pair)
    ]
    first = 0 if any(0 in pair for pair in whole) else 1
    return [(a - first, b - first) for a, b in whole if 0 <= a - first < count and 0 <= b - first < count]


def unnamed_points(count: int) -> list[str]:
    """Names for keypoints that have none."""
    return [f"point_{index}" for index in range(count)]


def match_points(own: Sequence[str], given: Sequence[str]) -> tuple[np.ndarray, str]:
    """Where the keypoints of one list are in another, by name.

    Points without a partner of their name take each other's places in their order, if there are as many on both sides:
    then they were renamed, or have no names at all on one side.

    Args:
        own: names as in the annotations.
        given: names as in the list that they are matched with.

    Returns:
        (len(given),) int64 position in ``own``, -1 where it has no such point; and what has to be said about it.
    """
    if list(own) == list(given) or not own or len(set(own)) < len(own) or len(set(given)) < len(given):
        short = min(len(own), len(given))
        return np.array([*range(short), *[-1] * (len(given) - short)], dtype=np.int64), ""
    order = np.array([own.index(name) if name in own else -1 for name in given], dtype=np.int64)
    alone = [index for index, name in enumerate(own) if name not in given]
    wanted = np.flatnonzero(order < 0).tolist()
    if len(alone) == len(wanted):
        order[wanted] = alone
        renamed = [f"'{own[index]}' is taken for '{given[place]}'" for index, place in zip(alone, wanted)]
        return order, ", ".join(renamed[:5]) if own != unnamed_points(len(own)) else ""
    lost = [f"'{own[index]}' is left out" for index in alone] + [f"'{given[place]}' is missing" for place in wanted]
    return order, ", ".join(lost[:5])


def add_sigmas_and_pairs(raw: dict[str, Any], categories: dict[int, Category], where: str) -> None:
    """Fill ``sigmas`` and ``flip_pairs`` of the categories (by id, names known) from a COCO dictionary, in place.

    Args:
        where: the file, for errors.

    Raises:
        UserError: sigmas that are not one positive number per keypoint, or pairs of points that do not exist.
    """
    info = raw.get("info") if isinstance(raw.get("info"), dict) else {}
    assert isinstance(info, dict)
    own = {whole_number(entry.get("id")): entry for entry in reversed(raw["categories"])}
    shared = _shared_sigmas(info.get("keypoint_sigmas"), list(categories.values()), where)
    pairs_for_all = info.get("flip_pairs")
    if pairs_for_all is not None:
        _check_pairs(pairs_for_all, list(categories.values()), f"{where}: info.flip_pairs")
    for identity, category in categories.items():
        entry, count = own[identity], len(category.keypoints)
        sigmas = shared if len(shared) == count else []
        for key in ("sigmas", "keypoint_sigmas"):
            if entry.get(key) is not None:
                sigmas = _numbers(entry[key], f"{where}: {key} of category '{category.name}'")
                if problem := check_sigmas(sigmas, count):
                    raise UserError(f"{where}: {key} of category '{category.name}': {problem}")
        pairs = entry.get("flip_pairs")
        if pairs is not None:
            _check_pairs(pairs, [category], f"{where}: flip_pairs of category '{category.name}'")
        elif pairs_for_all is not None:
            pairs = [pair for pair in pairs_for_all if set(pair) <= set(category.keypoints)]
        flip_pairs = None if pairs is None else [tuple(map(category.keypoints.index, pair)) for pair in pairs]
        categories[identity] = category.model_copy(update={"sigmas": sigmas, "flip_pairs": flip_pairs})


def describe_keypoints(category: Category) -> dict[str, Any]:
    """The entries about keypoints of a category in a COCO file; none for classes without keypoints."""
    names = category.keypoints
    if not names:
        return {}
    entry: dict[str, Any] = {"keypoints": list(names), "skeleton": [[a + 1, b + 1] for a, b in category.skeleton]}
    if category.sigmas:
        entry["keypoint_sigmas"] = list(category.sigmas)
    if category.flip_pairs is not None:
        entry["flip_pairs"] = [[names[a], names[b]] for a, b in category.flip_pairs]
    return entry


def _shared_sigmas(value: Any, categories: Sequence[Category], where: str) -> list[float]:
    """The sigmas in ``info``, which hold for every class with as many keypoints; there has to be such a class."""
    if value is None:
        return []
    sigmas = _numbers(value, f"{where}: info.keypoint_sigmas")
    counts = {len(category.keypoints): category.name for category in categories if category.keypoints}
    if sigmas and counts and len(sigmas) not in counts:
        has = ", ".join(f"'{name}' {count}" for count, name in counts.items())
        raise UserError(f"{where}: info.keypoint_sigmas has {len(sigmas)} numbers, but keypoints has category {has}")
    if problem := check_sigmas(sigmas, len(sigmas)):
        raise UserError(f"{where}: info.keypoint_sigmas: {problem}")
    return sigmas


def _numbers(value: Any, where: str) -> list[float]:
    found = numbers(value, len(value)) if isinstance(value, list) else None
    if found is None:
        raise UserError(f"{where} has to be a list of numbers, one per keypoint, not {value!r:.80}")
    return found


def _check_pairs(pairs: Any, categories: Sequence[Category], where: str) -> None:
    """Pairs of names, both of one class, no name twice."""
    form = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs
    )
    if not form:
        raise UserError(f"{where} has to be a list of pairs of keypoint names, not {pairs!r:.80}")
    known = [set(category.keypoints) for category in categories]
    for pair in pairs:
        if not any(set(pair) <= names for names in known):
            everything = sorted(set().union(*known))
            lost = next((name for name in pair if name not in everything), None)
            problem = f"no keypoint is called '{lost}'" if lost else f"no class has both points of {pair}"
            raise UserError(f"{where}: {problem} (there are {', '.join(everything[:20]) or 'none'})")
    names = list(chain.from_iterable(pairs))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: '{twice}' occurs twice; a keypoint has one mirror image")
