"""The pages of the documentation as text: fenced blocks, commands and inline code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"(<!-- (?P<mark>[^>]*?) -->\n+)?^(?P<indent> *)```(?P<head>[^\n`]*)\n(?P<text>.*?)^ *```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``mark``: the comment in front of it, such as ``not run here: ...``."""

    page: str
    language: str
    title: str
    mark: str
    text: str


def pages() -> list[Path]:
    """README, CONTRIBUTING and all pages below docs/."""
    return [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in order; all where no language is given."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for match in FENCE.finditer(read(page)):
        language, _, attributes = match["head"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', attributes)
        if not languages or language in languages:
            found.append(Block(name, language, title[1] if title else "", match["mark"] or "", match["text"]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The arguments of every ``mvision ...`` in a block, also of those that ``torchrun`` or ``srun`` start."""
    text = block.text.replace("\\\n", " ")
    lines = re.findall(
        r"^(?:\$ )?mvision (.*?)$|^(?:\$ )?(?:torchrun|ray|srun) .*?(?:-m|--) mvision (.*?)$", text, flags=re.M
    )
    found = (shlex.split(first or second, comments=True) for first, second in lines)
    # ``--rdzv-endpoint node:29500 -m mvision train`` has the word mvision in front; a ray job has it as its program.
    return [words[1:] if words[:1] == ["mvision"] else words for words in found]


def inline(page: Path) -> list[str]:
    """Inline code of a page, without fenced blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", read(page)))
