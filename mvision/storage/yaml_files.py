"""YAML that users bring along, read with limits: by PyYAML's safe loader, which never builds objects of classes.

A few hundred bytes of YAML can stand for gigabytes, because an alias (``*name``) repeats what its anchor (``&name``)
holds, and anchors nest. So nodes are counted as if every alias were written out, before anything is built from them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from mvision.errors import UserError
from mvision.storage.text_files import read_text

MAX_BYTES = 2 * 2**20  # names of 21,000 classes take half a megabyte
MAX_NODES = 200_000  # values, keys, lists and mappings; the names of 21,000 classes are 42,000
MAX_DEPTH = 50  # lists and mappings inside each other
MAX_DIGITS = 100  # of a number; Python takes minutes for one of a megabyte, and a pattern of YAML 1.1 (1:30:00) longer
NUMBER_TAGS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})
TEXT_TAG = "tag:yaml.org,2002:str"
MERGE_TAG = "tag:yaml.org,2002:merge"


def read_yaml(path: Path, where: str, as_text: Collection[str] = ()) -> Any:
    """The content of a YAML file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Args:
        path: the file.
        where: what errors begin with, such as ``config my.yaml``.
        as_text: see ``parse_yaml``.

    Returns:
        Dictionaries, lists and plain values; None for an empty file. A key that occurs twice has its last value.

    Raises:
        UserError: the file is missing, too large, no text or no valid YAML, or stands for more than it should.
    """
    text, _ = read_text(path, MAX_BYTES, where)
    return parse_yaml(text, where, as_text)


def parse_yaml(text: str, where: str, as_text: Collection[str] = ()) -> Any:
    """The content of one YAML document.

    Args:
        text: the document.
        where: what errors begin with.
        as_text: keys of the document's top level below which every value and key stays the text that is written there.
            YAML 1.1 would read ``no`` as False, ``010`` as 8 and ``1.50`` as 1.5, which classes may well be called.

    Raises:
        UserError: no valid YAML, or limits are exceeded; one line that names the line in the text.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _written_out(node, {}, set())
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in as_text:
                    _keep_text(value, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_one_line(error, text)}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader in Python: the one in C has no guard against deep nesting."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            of = (
                f"{MAX_DEPTH} lists and mappings inside each other"
                if self.depth > MAX_DEPTH
                else f"{MAX_NODES:,} values"
            )
            raise yaml.composer.ComposerError(None, None, f"more than {of}", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in NUMBER_TAGS and len(node.value) > MAX_DIGITS:
            problem = f"a number of more than {MAX_DIGITS} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            # PyYAML hands texts such as "2024-99-99" or "!!bool x" to Python's functions and lets through whatever
            # they raise: ValueError, KeyError, AttributeError and others.
            problem = f"{str(node.value)[:40]!r} cannot be read: {str(error)[:200]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _written_out(node: yaml.Node, counted: dict[int, int], open_nodes: set[int]) -> int:
    """Number of nodes in ``node`` with every alias written out; those of a node that occurs again are counted once."""
    if id(node) in counted:
        return counted[id(node)]
    if id(node) in open_nodes:
        raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", node.start_mark)
    open_nodes.add(id(node))
    number = 1
    if isinstance(node, yaml.MappingNode):
        number += sum(_written_out(part, counted, open_nodes) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        number += sum(_written_out(part, counted, open_nodes) for part in node.value)
    if number > MAX_NODES:
        problem = f"more than {MAX_NODES:,} values once every alias (*name) is written out"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    open_nodes.discard(id(node))
    counted[id(node)] = number
    return number


def _keep_text(node: yaml.Node, done: set[int]) -> None:
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        node.tag = TEXT_TAG
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _keep_text(part, done)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != MERGE_TAG:
                _keep_text(key, done)
            _keep_text(value, done)


def _one_line(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        began = error.context_mark if error.problem_mark is not None else None
        since = f", which began in line {began.line + 1}" if began is not None else ""
        context = f" ({error.context}{since})" if error.context else ""
        return " ".join(f"{place}{error.problem or 'unreadable'}{context}".split())
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed"
    return " ".join(str(error).split())
