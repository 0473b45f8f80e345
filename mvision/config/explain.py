"""Validation errors of the settings as one line that names the key, the value and the nearest known key."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from mvision.settings import Settings

KeyPath = tuple[str, ...]


def explain(error: ValidationError, schema: type[Settings], prefix: str = "") -> str:
    """The most telling mistake as one line: ``key: what is wrong (got value)``.

    Args:
        error: as raised by validating against ``schema``.
        schema: where the nearest known keys are looked up.
        prefix: the dotted path of ``schema`` in the whole file, such as ``model``.
    """
    mistakes: dict[KeyPath, list[Any]] = {}
    # A misspelt key comes first: "field required" is often only its consequence.
    for mistake in sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden"):
        mistakes.setdefault(_key_path(schema, mistake["loc"]), []).append(mistake)
    path, same_key = next(iter(mistakes.items()))
    key = ".".join((prefix, *path) if prefix else path) or "config"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if same_key[0]["type"] == "extra_forbidden":
        return f"unknown key '{key}': {_nearest_key(schema, path)}{more}"
    # A key that may be of several types has one mistake for each of them.
    message = ", or: ".join(dict.fromkeys(mistake["msg"].removeprefix("Value error, ") for mistake in same_key))
    message = message[:1].lower() + message[1:]
    return f"{key}: {message} (got {reprlib.repr(same_key[0]['input'])}){more}"


def _key_path(schema: type[Settings], location: tuple[int | str, ...]) -> KeyPath:
    """The part of pydantic's location that is in the file: without the tags of union members below a plain value."""
    path: KeyPath = ()
    for part in location:
        if path and isinstance(part, str) and _section(schema, path) is None:
            break
        path = (*path, str(part))
    return path


def _nearest_key(schema: type[Settings], path: KeyPath) -> str:
    if elsewhere := [key for key in _every_key(schema) if key.split(".")[-1] == path[-1]]:
        return f"did you mean '{elsewhere[0]}'?"
    section = _section(schema, path[:-1])
    known = sorted(section.model_fields) if section else []
    near = difflib.get_close_matches(path[-1], known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"


def _section(schema: type[Settings], path: KeyPath) -> type[Settings] | None:
    """The schema at ``path``, looking through lists; None for plain values."""
    section: type[Settings] | None = schema
    for part in path:
        if part.isdigit():
            continue
        field = section.model_fields.get(part) if section else None
        section = _schema_of(field.annotation) if field else None
    return section


def _schema_of(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (_schema_of(argument) for argument in get_args(annotation))
    return next((schema for schema in found if schema), None)


def _every_key(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        below = _schema_of(field.annotation)
        if below:
            yield from _every_key(below, f"{prefix}{name}.")
