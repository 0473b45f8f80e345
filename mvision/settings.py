"""Base class of the schemas of settings, and the replacement of keys that a schema no longer has."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from mvision.errors import UserError

# Far above every published model: a number above them is a mistake, or a weights file that wants all memory.
MAX_WIDTH, MAX_LAYERS, MAX_OBJECTS = 8192, 100, 100_000
LARGEST = 1e12  # of any number


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


class Settings(BaseModel):
    """A section of the YAML file with typed keys.

    Unknown keys are an error, and so are numbers that are infinite, not a number, or above ``LARGEST``: whatever the
    key, they are slips, and overflow in what is computed with them. Defaults and later assignments are validated too.

    Class attributes:
        retired: keys that older weights files and runs have in this section -> their values that have a replacement.
            Those of the base classes apply too.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False)
    retired: ClassVar[dict[str, list[Replacement]]] = {}

    @field_validator("*")
    @classmethod
    def _not_huge(cls, value: Any) -> Any:
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"input should be between -{LARGEST:g} and {LARGEST:g}")
        return value


def without_retired(schema: type[Settings], section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every retired key of their schema replaced.

    Args:
        section: dotted name of the section for error messages, such as ``train``.

    Raises:
        UserError: a retired key has a value without a replacement.
    """
    kept = dict(settings)
    retired = {key: known for base in schema.__mro__[::-1] for key, known in vars(base).get("retired", {}).items()}
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
