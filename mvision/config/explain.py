"""Validation errors of the settings as one line that names the key, its value and the nearest known key."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from mvision.errors import did_you_mean
from mvision.settings import Settings

KeyPath = tuple[str, ...]


def explain(error: ValidationError, schema: type[Settings], prefix: str = "") -> str:
    """The most helpful of the error's mistakes as one line: ``key: what is wrong (got value)``.

    Args:
        error: from validating against ``schema``.
        schema: its keys are what an unknown key is compared with.
        prefix: dotted path of ``schema`` in the whole file, such as ``model``.
    """
    mistakes: dict[KeyPath, list[Any]] = {}
    # Unknown keys come first: "field required" is often only the consequence of a misspelt key.
    for mistake in sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden"):
        mistakes.setdefault(_key_path(schema, mistake["loc"]), []).append(mistake)
    path, same_key = next(iter(mistakes.items()))
    key = ".".join((prefix, *path) if prefix else path) or "config"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if same_key[0]["type"] == "extra_forbidden":
        return f"unknown key '{key}': {_suggestion(schema, path)}{more}"
    # pydantic reports a key that may have several types once for each of them.
    message = ", or: ".join(dict.fromkeys(mistake["msg"].removeprefix("Value error, ") for mistake in same_key))
    message = message[:1].lower() + message[1:]
    return f"{key}: {message} (got {reprlib.repr(same_key[0]['input'])}){more}"


def _key_path(schema: type[Settings], location: tuple[int | str, ...]) -> KeyPath:
    """pydantic's location up to the key that is in the file: after that it names the types that a value may have."""
    path: KeyPath = ()
    for part in location:
        if path and isinstance(part, str) and _section(schema, path) is None:
            break
        path = (*path, str(part))
    return path


def _suggestion(schema: type[Settings], path: KeyPath) -> str:
    """The key of this name in another section if there is one, else the nearest key of the same section."""
    same_name = next((key for key in _all_keys(schema) if key.split(".")[-1] == path[-1]), None)
    if same_name:
        return f"did you mean '{same_name}'?"
    section = _section(schema, path[:-1])
    return did_you_mean(path[-1], section.model_fields if section else [])


def _section(schema: type[Settings], path: KeyPath) -> type[Settings] | None:
    """The schema of the section at ``path``, in which numbers index lists; None if a plain value is there."""
    section: type[Settings] | None = schema
    for part in path:
        if part.isdigit():
            continue
        field = section.model_fields.get(part) if section else None
        section = _schema_in(field.annotation) if field else None
    return section


def _schema_in(annotation: Any) -> type[Settings] | None:
    """The first schema in a type such as ``list[MoreDataConfig]``."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (_schema_in(argument) for argument in get_args(annotation))
    return next((schema for schema in found if schema), None)


def _all_keys(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema and of the sections below it."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        below = _schema_in(field.annotation)
        if below:
            yield from _all_keys(below, f"{prefix}{name}.")
