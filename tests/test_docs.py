"""The code in the pages under docs/ runs as it is written there, and their figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mvision.config import schema
from mvision.inference import streams
from mvision.storage import pickles, yaml_files
from mvision.structures import decoding
from mvision.structures.images import MAX_SCANS
from mvision.weights import save_weights, stored
from mvision.weights.files import ORIGINALS, PICKLES
from tests.test_weights import make_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "neck.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


def test_every_recipe_is_tried() -> None:
    assert len(BLOCKS) == 4


def test_the_neck_on_a_bare_timm_model() -> None:
    names: dict = {}
    exec(BLOCKS[0], names)
    assert [tuple(names[p].shape) for p in ("p3", "p4", "p5")] == [(1, 192, 32, 40), (1, 192, 16, 20), (1, 192, 8, 10)]


def test_the_neck_with_other_settings() -> None:
    names: dict = {}
    exec(BLOCKS[3], names)
    assert [tuple(names[p].shape) for p in ("p3", "p4", "p5")] == [(1, 192, 32, 40), (1, 192, 16, 20), (1, 192, 8, 10)]


def test_the_neck_as_a_decoder_of_smp() -> None:
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["logits"].shape == (2, 3, 128, 160)
    gradients = [parameter.grad for parameter in names["model"].decoder.neck.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_trained_neck_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = make_model()
    save_weights(trained, tmp_path / "runs" / "detection" / "1" / "best.safetensors")
    names: dict = {}
    exec(BLOCKS[2], names)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        expected = trained.neck(trained.backbone(images))
        for found, other in zip(names["neck"](names["backbone"](images)), expected):
            torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)
    assert set(torch.load(tmp_path / "neck.pt")) == set(names["neck"].state_dict())


def test_the_limits_on_the_security_page() -> None:
    page = " ".join((PAGE.parent / "security.md").read_text(encoding="utf-8").split())
    for text in (
        f"up to {yaml_files.MAX_BYTES >> 20} MiB, {yaml_files.MAX_NODES:,} values with every alias written out, "
        f"{yaml_files.MAX_DEPTH} levels, numbers of {yaml_files.MAX_DIGITS} characters",
        f"| {decoding.DEFAULT_LIMIT >> 30} GiB: about 19,000 x 19,000 pixels | the environment variable "
        f"`{decoding.LIMIT_VARIABLE}`",
        f"may have {MAX_SCANS} passes",
        f"whose pickle takes {pickles.MAX_PICKLE >> 20} MiB at most",
        f"| header of weights | {stored.MAX_HEADER >> 20} MiB |",
        f"| {schema.MAX_CLASSES:,}; {schema.MAX_SIDE:,} pixels |",
        f"| a web picture | {streams.MAX_DOWNLOAD >> 20} MB, {streams.MAX_SECONDS:.0f} s |",
        f"given up after {streams.TIMEOUT:.0f} s",
    ):
        assert text in page, text
    assert pytest.approx(decoding.DEFAULT_LIMIT, rel=0.02) == 19_000**2 * decoding.BYTES_PER_PIXEL
    for name in (*decoding.FORMATS, *streams.PROTOCOLS):
        assert name in page, name
    assert set(re.findall(r"`(\.\w+)`", page)) == PICKLES - {".pickle"} | ORIGINALS
