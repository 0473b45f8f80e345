"""Settings of heads that older weights files and runs still name: what they became."""

from __future__ import annotations

from typing import Any

from mvision.errors import UserError

RETIRED: dict[str, dict[Any, dict[str, Any]]] = {
    "learned_queries": {False: {}},
    "boxes_from_masks": {False: {}},
}
"""Key of a head's section -> a value that it could have -> the settings that stand for it now."""


def without_retired(task: str, section: dict[str, Any]) -> dict[str, Any]:
    """The section of a head as it is written today.

    Raises:
        UserError: a retired key has a value for which there is no replacement.
    """
    kept = {key: value for key, value in section.items() if key not in RETIRED}
    for key in section.keys() & RETIRED.keys():
        replacements = RETIRED[key]
        if section[key] not in replacements:
            raise UserError(
                f"model.heads.{task}.{key}: {section[key]!r} is not supported any more; leave the key out, or use an "
                "older version of mvision"
            )
        kept |= replacements[section[key]]
    return kept
