"""Hostile values, and ways to damage trees (JSON, YAML), text and bytes. Used by ``fuzz.py``."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from random import Random
from typing import Any

NAMES = [
    "",
    " ",
    ".",
    "..",
    "/",
    "a" * 5000,
    "con",
    "no",
    "010",
    "1e3",
    "null",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "two\nlines",
    "tab\tand\rreturn",
    "\u202egnp.exe\u2066",
    "\x9b2J",
    "\ud800",
    "nul\x00byte",
    "|pipe|`tick`[link](http://x)<b>",
    "名前 ひと ชื่อ नाम",
    "e\u0301" * 50,
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "C:\\data\\x.png",
    "images/../images/0.png",
    "$(touch x); rm -rf *",
    "{0.__class__}%s%n%(x)d",
]
NUMBERS = [
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    10**400,
    2e9,
    -(10**12),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [[[[[]]]]], [None], {"": 0}, {"a": {"b": {"c": 1}}}, [1] * 1000]

# Placeholders in a tree for text that ``json.dumps`` cannot write.
RAW = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 5000,
    "@huge float@": "1e99999",
    "@surrogate@": '"\\ud800\\udc00\\udfff"',
    "@twice@": '{"id": 1, "id": 2}',
}


def junk(rng: Random, old: Any = None) -> Any:
    """A value that hardly anybody expects; ``old`` is what it stands for, which may come back as another type."""
    choice = rng.random()
    if choice < 0.15 and old is not None:
        return rng.choice([str(old), [old], {"value": old}, f" {old} ", f"{old}.0", f"+{old}"])
    if choice < 0.3 and isinstance(old, int | float) and not isinstance(old, bool):
        return rng.choice([-old, old + 0.5, old * 10**9, old * -(10**9), old + 2**32, old / 1e9])
    if choice < 0.55:
        return rng.choice(NUMBERS)
    if choice < 0.75:
        return rng.choice(NAMES)
    if choice < 0.82:
        return rng.choice(list(RAW))
    return copy.deepcopy(rng.choice(OTHERS))


def _walk(tree: Any, shape: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, Any]]:
    """(shape, container, key) of every entry; a shape has ``*`` for the index of a list."""
    if isinstance(tree, dict):
        entries = [((*shape, str(key)), key, value) for key, value in tree.items()]
    elif isinstance(tree, list):
        entries = [((*shape, "*"), index, value) for index, value in enumerate(tree)]
    else:
        return []
    found = [(inner, tree, key) for inner, key, _ in entries]
    for inner, _, value in entries:
        found += _walk(value, inner)
    return found


def mutate_tree(rng: Random, tree: Any, special: dict[str, list[Any]] | None = None) -> tuple[Any, str]:
    """A damaged copy of a tree, and what was done.

    Entries are chosen by their kind first, so that the one category is met as often as the hundred annotations.

    Args:
        special: key -> values that are hostile for this key in particular.
    """
    tree, done = copy.deepcopy(tree), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        entries = _walk(tree)
        if not entries:
            return junk(rng), "everything replaced"
        shape = rng.choice(sorted({entry[0] for entry in entries}))
        places = [(container, key) for found, container, key in entries if found == shape]
        everywhere = rng.random() < 0.25
        container, key = rng.choice(places)
        operation = rng.choice(["value", "value", "value", "special", "drop", "twice", "rename", "swap", "unknown"])
        value = rng.choice((special or {}).get(shape[-1], [None])) if operation == "special" else None
        if value is None:
            value = junk(rng, container[key])
        for inner, place in places if everywhere else [(container, key)]:
            _change(rng, inner, place, operation, value)
        done.append(f"{operation} {'.'.join(shape)}{' everywhere' if everywhere else ''} {str(value)[:60]!r}")
    return tree, "; ".join(done)


def _change(rng: Random, container: Any, key: Any, operation: str, value: Any) -> None:
    is_list = isinstance(container, list)
    if (is_list and not 0 <= key < len(container)) or (not is_list and key not in container):
        return  # gone by an earlier change in this container
    if operation == "drop":
        del container[key]
    elif operation == "twice" and is_list:
        container.insert(key, copy.deepcopy(container[key]))
    elif operation == "rename" and not is_list:
        container[rng.choice([str(key).upper(), f"{key} ", f"_{key}", *NAMES])] = container.pop(key)
    elif operation == "swap" and not is_list:
        other = rng.choice(list(container))
        container[key], container[other] = container[other], container[key]
    elif operation == "unknown" and not is_list:
        container[rng.choice(NAMES)] = copy.deepcopy(value)
    else:
        container[key] = copy.deepcopy(value)


def to_json(tree: Any) -> str:
    """As JSON, with NaN and Infinity, and with the placeholders of ``RAW`` replaced."""
    text = json.dumps(tree)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def mutate_text(rng: Random, text: str) -> tuple[bytes, str]:
    """Text as damaged or oddly encoded bytes."""
    data = text.encode("utf-8", "surrogatepass")
    plain = text.encode("utf-8", "replace").decode("utf-8")
    kind = rng.choice(["as it is"] * 6 + ["bom", "utf-16", "utf-16 without bom", "utf-32", "latin-1", "crlf", "bytes"])
    if kind == "bom":
        data = b"\xef\xbb\xbf" * rng.choice([1, 2]) + data
    elif kind.startswith("utf"):
        data = plain.encode("utf-16-le" if "without" in kind else kind)
    elif kind == "latin-1":
        data = ("# caf\xe9\n" + plain).encode("latin-1", "replace")
    elif kind == "crlf":
        data = data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", "\u2028".encode(), b"\x0b", b"\x00\n"]))
    elif kind == "bytes":
        return mutate_bytes(rng, data)
    return data, kind


def mutate_lines(rng: Random, text: str) -> tuple[str, str]:
    """Lines and words of a text dropped, doubled, moved or replaced."""
    lines = text.split("\n")
    done = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        row = rng.randrange(len(lines))
        operation = rng.choice(
            ["word", "word", "word", "drop word", "add word", "drop", "twice", "junk", "long", "join"]
        )
        words = lines[row].split(" ")
        column = rng.randrange(len(words))
        value = rng.choice([str(junk(rng, words[column])), str(rng.choice(NUMBERS)), rng.choice(NAMES)])
        if operation == "word":
            words[column] = value
        elif operation == "drop word":
            del words[column]
        elif operation == "add word":
            words.insert(column, value)
        elif operation == "long":
            words += [value[:20]] * 5000
        lines[row] = {"junk": value, "join": ",".join(words)}.get(operation, " ".join(words))
        if operation == "drop" and len(lines) > 1:
            del lines[row]
        elif operation == "twice":
            lines.insert(row, lines[row])
        done.append(f"{operation} in line {row + 1} {value[:40]!r}")
    return "\n".join(lines), "; ".join(done)


def mutate_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Bits flipped, pieces cut, doubled, moved or overwritten."""
    kind = rng.choice(["flip", "flip", "cut", "truncate", "twice", "zero", "ones", "noise", "swap", "empty", "append"])
    changed = bytearray(data)
    size = len(changed)
    at = rng.randrange(min(size, rng.choice([16, 64, 512, size])) or 1)
    length = rng.choice([1, 2, 4, 16, 256])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            place = rng.randrange(min(size, rng.choice([32, 256, size])) or 1)
            changed[place : place + 1] = bytes([changed[place] ^ (1 << rng.randrange(8))]) if changed else b""
    elif kind == "cut":
        del changed[at : at + length]
    elif kind == "truncate":
        del changed[rng.randrange(size + 1) :]
    elif kind == "twice":
        changed[at:at] = changed[at : at + length]
    elif kind == "swap":
        changed[at : at + length], changed[-length:] = changed[-length:], changed[at : at + length]
    elif kind == "empty":
        changed.clear()
    elif kind == "append":
        changed += rng.randbytes(length) * rng.choice([1, 1000])
    else:
        changed[at : at + length] = {"zero": bytes(length), "ones": b"\xff" * length}.get(kind, rng.randbytes(length))
    return bytes(changed), f"bytes: {kind} at {at}"


def png_chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG with its right checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
