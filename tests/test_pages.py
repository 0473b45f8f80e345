"""What the README and the pages under docs/ tell people to type exists: commands, keys, files, extras, links."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mvision.cli.main import cli
from mvision.config import load_config
from tests.pages import DOCS, README, ROOT, Block, blocks, commands, inline, pages, read

PAGES = pages()
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)
# Written by programs, or about other states of the code: their commands are checked where they are made.
HISTORY = {"docs/mutations.md"}


def parse(arguments: list[str]) -> click.Context:
    """The command with its options, not run. Raises click's errors: an unknown option, a missing argument."""
    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    words = ["1" if word == "N" else word for word in rest if word != "..."]  # --seed N
    return command.make_context("mvision", words)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that options ask for before anything runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    for run in ("detection/1", "other_images", "other_classes", "stopped"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    return tmp_path


@every_page
def test_commands_parse(page: Path, place: Path) -> None:
    for block in blocks(page, "bash", "console"):
        for arguments in () if block.mark.startswith("not parsed") else commands(block):
            if "--modle" in arguments:  # a page shows what is said of it
                continue
            if "$" not in " ".join(arguments):  # a shell's variables are not expanded
                parse(arguments)


@every_page
def test_options_and_keys_in_the_text_exist(page: Path, place: Path) -> None:
    """``mvision train --folds 5`` in a sentence may lack what the command needs, but has no unknown option."""
    for text in inline(page):
        words = text.replace("...", "").split()
        if words[:1] != ["mvision"] or words[1:2] == [] or page.relative_to(ROOT).as_posix() in HISTORY:
            continue
        command: click.Command = cli
        rest = words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, text
            command = command.commands[rest.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h", "--version"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, text


def assignments() -> Iterator[tuple[str, str, list[str]]]:
    """Page, model and all ``-o KEY=VALUE`` of every command; those in sentences with the model ``tiny``."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page, "bash", "console"):
            for arguments in () if block.mark.startswith("not parsed") else commands(block):
                given = [arguments[k + 1] for k, word in enumerate(arguments) if word == "-o"]
                if given and "train.lrr=3" not in given:  # a page shows what is said of it
                    tasks = [arguments[k + 1] for k, word in enumerate(arguments) if word == "--task"]
                    yield name, ",".join(tasks), given
        for text in inline(page):
            found = re.findall(r"(?:^|\s)-o\s+('[^']+'|\S+)", text)
            if found and name not in HISTORY and not any("..." in one for one in found):
                yield name, "", [shlex.split(one)[0] for one in found]


@pytest.mark.parametrize(("page", "tasks", "given"), [*assignments()])
def test_keys_of_the_commands_are_keys_of_the_config(page: str, tasks: str, given: list[str]) -> None:
    named = [
        name for name in ("detection", "instance-seg", "keypoints", "semantic-seg") if f"heads.{name}." in str(given)
    ]
    known = dict.fromkeys([*(tasks.split(",") if tasks else []), *named]) or {"detection": None}
    if any("queries=shared" in one for one in given):
        known["detection"] = None
    load_config("tiny", tasks=list(known), assignments=given)


@every_page
def test_yaml_is_a_config(page: Path, tmp_path: Path) -> None:
    """But for blocks whose title names another file."""
    for block in blocks(page, "yaml"):
        if not block.title:
            (tmp_path / "my.yaml").write_text(block.text, encoding="utf-8")
            load_config(file=tmp_path / "my.yaml", tasks=["detection"])


def test_what_the_yaml_says_is_what_the_config_has(tmp_path: Path) -> None:
    found = []
    for name in ("augmentation.md", "joint.md", "configuration.md"):
        for block in blocks(DOCS / name, "yaml"):
            (tmp_path / "my.yaml").write_text(block.text, encoding="utf-8")
            found.append(load_config(file=tmp_path / "my.yaml", tasks=["detection"]))
    augmented, varied, _dense, mixed, own = found  # tests/test_augment_stages.py has the third
    assert [(extra.name, extra.args["p"]) for extra in augmented.data.augment.extra] == [
        *(("GaussianBlur", 0.3), ("Rotate", 0.5))
    ]
    assert (varied.data.augment.copy_paste, varied.data.augment.rotate, varied.data.augment.scale) == (0.5, 30, 0.3)
    assert mixed.data.more[0].weight == 2.0
    assert own.model.image_size == (480, 640)


@every_page
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        if "--8<--" not in block.text:
            ast.parse(block.text)


@every_page
def test_scripts_tests_and_extras_that_are_named_exist(page: Path) -> None:
    text = read(page)
    for path in re.findall(r"\b((?:docs/scripts|tests)/[\w/]+\.\w+)", text):
        assert (ROOT / path).is_file(), path
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for extras in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras


def anchors(page: Path) -> set[str]:
    """As the site makes them of headings; GitHub keeps two hyphens beside a sign that is dropped."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[- ]+", "-", re.sub(r"[^\w\- ]", "", heading).strip()) for heading in plain}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    """In the repository as on the site; ``mkdocs build --strict`` looks at those of the site, not at the README's."""
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        included = read(file) if file.suffix == ".md" else ""
        if anchor and "--8<--" not in included:
            assert anchor in anchors(file), target


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text[text.index("\nnav:") :], flags=re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_site_takes_nothing_from_other_hosts() -> None:
    """The build reports what it finds; this is about what it is told to let pass."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in text
    assert "assets_fetch: false" in text
    assert re.findall(r"assets_exclude: \[(.*?)\]", text) == ["unpkg.com/mermaid*"]
    assert not [block for page in PAGES for block in blocks(page, "mermaid")]
    (build,) = re.findall(r"mkdocs build --strict.*", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert not re.search(r"\s(?:-q|--quiet)\b", build), "mkdocs counts no warning that it does not print"


def test_the_readme_is_short() -> None:
    assert len(read(README).splitlines()) <= 140
    links = set(re.findall(r"\]\(docs/([\w./-]+\.md)", read(README)))
    assert {"index.md", "quickstart.md", "data.md", "finetuning.md", "troubleshooting.md", "api.md"} <= links


def test_extras_are_all_explained() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", read(DOCS / "quickstart.md"), flags=re.M))
    assert named == set(setup["options.extras_require"]) - {"dev"}


def test_a_block_knows_its_mark_and_its_commands() -> None:
    block = Block(
        "p", "bash", "", "", "$ mvision val --weights a \\\n  --data b  # c\ntorchrun --n 2 -m mvision train ...\n"
    )
    assert commands(block) == [["val", "--weights", "a", "--data", "b"], ["train", "..."]]
