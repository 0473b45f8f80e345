"""Files of Paddle are read as arrays of numbers alone: nothing in them is run, and they take no more than they hold."""

from __future__ import annotations

import builtins
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvision import UserError
from mvision.storage import paddle_pickles
from mvision.storage.paddle_pickles import load_arrays
from mvision.weights.paddle import _tensor
from tests.paddle_files import by_paddle, refusal, write

SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def test_files_that_paddle_wrote(tmp_path: Path) -> None:
    expected = np.arange(6).reshape(3, 2) / 8 - 0.25
    for name in ("protocol 2", "protocol 4", "nested"):
        (tmp_path / "a.pdparams").write_bytes(by_paddle(name))
        arrays = load_arrays(tmp_path / "a.pdparams")
        assert list(arrays) == [f"{layer}" for layer in (
            *("linear.weight", "linear.bias", "norm.weight", "norm.bias", "norm._mean", "norm._variance"),
        )]  # fmt: skip
        np.testing.assert_array_equal(arrays["linear.weight"], expected)
        assert arrays["linear.weight"].dtype == np.float32


def test_half_precision(tmp_path: Path) -> None:
    """Paddle writes bfloat16 as whole numbers."""
    (tmp_path / "a.pdparams").write_bytes(by_paddle("bfloat16"))
    found = _tensor("linear.weight", load_arrays(tmp_path / "a.pdparams")["linear.weight"])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), (torch.arange(6.0).view(3, 2) / 8 - 0.25).T)


def test_layouts(tmp_path: Path) -> None:
    """Arrays by columns, of other byte orders and of NumPy 1."""
    arrays = {"a": np.asfortranarray(SMALL["a"]), "b": SMALL["a"].astype(">f8"), "c": np.full((), 3, np.float32)}
    path = tmp_path / "a.pdparams"
    for protocol in (2, 4):
        found = load_arrays(write(path, arrays, protocol))
        assert all(np.array_equal(array, arrays[name]) for name, array in found.items())
        for new, old in ((b"cnumpy._core.", b"cnumpy.core."), (b"\x16numpy._core.", b"\x15numpy.core.")):
            path.write_bytes(path.read_bytes().replace(new, old))
        assert b"numpy.core.multiarray" in path.read_bytes()
        assert np.array_equal(load_arrays(path)["a"], arrays["a"])


class Calls:
    """Is unpickled by calling a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch ran",), "posix.system"),
        (builtins.eval, ("open('ran', 'w')",), "eval"),
        (builtins.getattr, (SMALL, "clear"), "getattr"),
        (np.load, ("ran.npy",), "numpy.load"),
        (np.memmap, ("ran", "u1", "w+", 0, (9,)), "numpy.memmap"),
        (np.fromfile, ("ran",), "fromfile"),
        (np.zeros, (3,), "zeros"),
        (torch.load, ("ran",), "load"),
        (pickle.loads, (b"",), "loads"),
    ],
)
@pytest.mark.parametrize("place", ["array", "name", "nested"])
def test_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, arguments: Any, name: str, place: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    harm = Calls(function, *arguments)
    content = {"array": {**SMALL, "c": harm}, "name": {"a": ("a", harm)}, "nested": {"model": {"a": [{"b": harm}]}}}
    message = refusal(write(tmp_path / "a.pdparams", content[place], protocol))
    assert "it would run code when opened (" in message
    assert f"{name});" in message
    assert [file.name for file in tmp_path.iterdir()] == ["a.pdparams"]


def as_pickle(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


RECONSTRUCT, NDARRAY, DTYPE, ENCODE = (
    b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_pickle(NDARRAY, b"(J\x00\x00\x00\x7fJ\x00\x00\x00\x7ftR"), "in another way than files of Paddle do"),
        (as_pickle(RECONSTRUCT, b"(", RECONSTRUCT, b"K\x00\x85C\x01btR"), "in another way than files of Paddle do"),
        (as_pickle(ENCODE, b"(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR"), "in another way than files of Paddle do"),
        (as_pickle(b"}", b"(K\x01tR"), "in another way than files of Paddle do"),
        (as_pickle(DTYPE, b"X\x02\x00\x00\x00O8\x85R"), "of 'O8', and only arrays of numbers are read"),
        (as_pickle(DTYPE, b"X\x02\x00\x00\x00V8\x85R"), "of 'V8', and only arrays of numbers are read"),
        (as_pickle(b"(S'x'\nios\nsystem\n"), "more in it than arrays of numbers (STRING)"),
        (as_pickle(b"(X\x01\x00\x00\x00xios\nsystem\n"), "it would run code when opened (os.system)"),
        (as_pickle(b"cos\nsystem\n\x93"), "it would run code when opened (os.system)"),
        (as_pickle(b"(cos\nsystem\no"), "it would run code when opened (os.system)"),
        (as_pickle(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"), "it would run code when opened (os.system)"),
        (as_pickle(b"X\x02\x00\x00\x00o\nX\x02\x00\x00\x00\x1b\n\x93"), r"it would run code when opened (o\n.\x1b\n)"),
        (as_pickle(b"X\x01\x00\x00\x00xQ"), "more in it than arrays of numbers (BINPERSID)"),
        (as_pickle(b"\x82\x01"), "more in it than arrays of numbers (EXT1)"),
        (as_pickle(NDARRAY, b")\x81"), "more in it than arrays of numbers (NEWOBJ)"),
        (as_pickle(NDARRAY, b"}b"), "its pickle changes things that are no arrays"),
        (as_pickle(b"}K\x01K\x02s"), "has keys that are no texts"),
        (as_pickle(b"K\x01r\xff\xff\xff\xff"), "holds a int, not arrays by their names"),
        (as_pickle(b"h\x07"), "damaged"),
        (as_pickle(b""), "damaged"),
        (as_pickle(b"t"), "damaged"),
        (as_pickle(b"\x85"), "damaged"),
        (as_pickle(b"X\x01\x00\x00\x00aK\x02s"), "damaged"),
        (as_pickle(b"}X\x01\x00\x00\x00a", RECONSTRUCT, b"(", NDARRAY, b"K\x00\x85C\x01btRs"), "has no numbers"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "damaged, or not copied or downloaded to the end"),
        (b"", "it is empty"),
        (b"\x80\x05}.", "no pickle of protocol 2 to 4"),
        (b"PK\x03\x04", "it is a zip archive"),
        (b"safetensors", "no pickle of protocol 2 to 4"),
    ],
)
def test_programs_that_paddle_never_writes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pdparams").write_bytes(content)
    assert message in refusal(tmp_path / "a.pdparams")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([print, "x"], dtype=object), "an array in it is of 'O8', and only arrays of numbers are read"),
        (np.array(["x", None], dtype=object), "an array in it is of 'O8', and only arrays of numbers are read"),
        (np.array(["text"]), "an array in it is of 'U4', and only arrays of numbers are read"),
        (np.zeros(2, dtype="i4,f4"), "an array in it is of 'V8', and only arrays of numbers are read"),
        (np.zeros(2, dtype=np.complex64), "an array in it is of 'c8', and only arrays of numbers are read"),
        (np.float32(2), "core.multiarray.scalar)"),
        (np.ma.zeros(2), "it would run code when opened (numpy.ma"),
    ],
)
def test_arrays_of_other_things(tmp_path: Path, array: Any, message: str) -> None:
    assert message in refusal(write(tmp_path / "a.pdparams", {**SMALL, "c": array}))


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_that_are_cut_off(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "a.pdparams", SMALL, protocol)
    whole = path.read_bytes()
    for length in range(1, len(whole), 3):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert "damaged, or not copied or downloaded to the end" in message or length < 3


@pytest.mark.parametrize("seed", range(3))
def test_files_with_wrong_bytes(tmp_path: Path, seed: int) -> None:
    """Each is read, or refused in one line."""
    generator, path = np.random.default_rng(seed), tmp_path / "a.pdparams"
    whole, line, refused = write(path, SMALL, 2 + seed).read_bytes(), "", 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in generator.integers(2, len(whole), 1):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            arrays = load_arrays(path)
        except UserError as error:
            arrays, line = {}, str(error)
            refused += 1
        assert arrays or (line.startswith(f"weights {path}: ") and line.isprintable())
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert 30 < refused < 300


def test_claims_of_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, path = np.zeros(10_000, np.float32), tmp_path / "a.pdparams"
    assert "its arrays claim more than the" in refusal(
        write(path, {f"tensor {number}": shared for number in range(50)})
    )
    whole = write(path, SMALL).read_bytes()
    path.write_bytes(whole.replace(b"K\x02K\x03\x86", b"K\x7fK\x03\x86"))
    assert "an array of shape [127, 3] has 24 bytes" in refusal(path)
    monkeypatch.setattr(paddle_pickles, "MAX_INSTRUCTIONS", 20)
    assert "its pickle has more than 20 instructions" in refusal(write(path, SMALL))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"}", b"K\x01s", "has keys that are no texts"),  # Python's own unpickler crashes here
        (b"", b"X\x01\x00\x00\x00x\x93", "damaged"),
        (DTYPE, b"\x85R", "an array in it is of something else, and only arrays of numbers are read"),
        (b"}X\x01\x00\x00\x00x", b"s", "'x' is a tuple, not an array"),
    ],
)
def test_tuples_in_tuples(tmp_path: Path, before: bytes, after: bytes, message: str) -> None:
    (tmp_path / "a.pdparams").write_bytes(as_pickle(before, b")", 100_000 * b"\x85", after))
    assert message in refusal(tmp_path / "a.pdparams")


def test_shapes_of_huge_numbers(tmp_path: Path) -> None:
    """The product of many of them alone would take minutes."""
    shape = b"(" + 2_000 * (b"\x8a\xff" + 254 * b"\xff" + b"\x7f") + b"t"
    kind = DTYPE + b"X\x02\x00\x00\x00f4\x85R"
    array = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR(K\x01" + shape + kind + b"\x89C\x00tb"
    (tmp_path / "a.pdparams").write_bytes(as_pickle(b"}X\x01\x00\x00\x00x", array, b"s"))
    assert "the shape of an array is none" in refusal(tmp_path / "a.pdparams")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "there are no arrays in it"),
        ({"a\n\x1b": SMALL["a"]}, r"has control characters in it"),
        ({"epoch": 3}, "'epoch' is a int, not an array"),
        ({"model": {"a": 3}}, "'a' is a int, not an array"),
        (OrderedDict(SMALL), "not a Mask-RT-DETR on HGNetV2"),
        (SMALL, "not a Mask-RT-DETR on HGNetV2, of which alone .pdparams files can be read"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(write(tmp_path / "a.pdparams", content))
