"""Keys that older weights files and runs still have in their configs, and the settings that replace them today."""

from __future__ import annotations

from typing import Any, NamedTuple

from mvision.errors import UserError


class Replacement(NamedTuple):
    """What means the same today as a value of a retired key.

    Attributes:
        value: of the retired key.
        settings: keys of the same section with their values.
        without: keys of the same section that had no effect with this value and are retired with it.
    """

    value: Any
    settings: dict[str, Any] = {}
    without: frozenset[str] = frozenset()


_ONLY_WITH_INSTANCES = frozenset(
    ("pixel_dim", "map_dim", "box_weight", "giou_weight", "visible_weight", "map_weight"),
)
RETIRED: dict[str, dict[str, list[Replacement]]] = {
    "model.heads": {
        "learned_queries": [Replacement(False)],
        "boxes_from_masks": [Replacement(False)],
        "predict": [
            Replacement("instances", {"kind": "dense"}),
            Replacement("points", {"kind": "minimal"}, without=_ONLY_WITH_INSTANCES),
        ],
    },
    "model.heads.instance-seg": {
        "pixel_stride": [Replacement(4)],
        "mask_weight": [Replacement(5.0)],
        "dice_weight": [Replacement(5.0)],
    },
    "model.heads.semantic-seg": {
        "dropout": [Replacement(0.1)],
        "focal_weight": [Replacement(2.0)],
        "dice_weight": [Replacement(1.0)],
        "gamma": [Replacement(1.0)],
    },
    "train": {
        "channels_last": [Replacement(True)],
    },
}
"""Section -> retired key -> its values that have a replacement; those of ``model.heads`` apply to every task."""


def without_retired(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section with every retired key replaced.

    Args:
        section: its dotted name, such as ``train`` or ``model.heads.detection``.

    Raises:
        UserError: a retired key has a value without a replacement.
    """
    retired = RETIRED.get(section.rpartition(".")[0], {}) | RETIRED.get(section, {})
    kept = dict(settings)
    for key in settings.keys() & retired.keys():
        value = kept.pop(key)
        replacement = next((entry for entry in retired[key] if entry.value == value), None)
        if replacement is None:
            raise UserError(
                f"{section}.{key}: {value!r} is not supported any more; leave the key out, or use an older version of "
                "mvision"
            )
        kept = {name: kept[name] for name in kept if name not in replacement.without} | replacement.settings
    return kept
