"""Reading YAML that users bring along: text that stays text, limits, and errors in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mvision.errors import UserError
from mvision.storage.yaml_files import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

TEN_LEVELS = "a: &l0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"k{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGED = "a: &l0 {x: 1, y: 2}\n" + "".join(
    f"k{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)


def test_values_below_chosen_keys_stay_text() -> None:
    words = ["no", "yes", "010", "1.50", "1_0", "2024-01-01", "null", "~", "0x1F", "1e3", "12:30", "=", "<<"]
    tree = parse_yaml(f"names: [{', '.join(words)}]\nother: [no, 010, 1.50]\n", "data.yaml", ("names",))
    assert tree == {"names": words, "other": [False, 8, 1.5]}
    tree = parse_yaml("names:\n  08: no\n  010: &x yes\n  11: *x\n", "data.yaml", ("names",))
    assert tree == {"names": {"08": "no", "010": "yes", "11": "yes"}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_bytes("names: [Käfer, bicycle]\r\n".encode(encoding))
    assert read_yaml(tmp_path / "a.yaml", "config") == {"names": ["Käfer", "bicycle"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEN_LEVELS, r"line \d+, column \d+: more than 200,000 values once every alias"),
        (MERGED, r"line \d+, column \d+: more than 200,000 values once every alias"),
        ("a: &a [*a]", r"line 1, column 4: an alias inside of what it stands for"),
        ("[" * 5000, f"line 1, column 51: more than {MAX_DEPTH} lists and mappings inside each other"),
        ("a: " + "9" * 5000, "line 1, column 4: a number of more than 100 characters"),
        ("a: " + "1:" * 200_000 + "1", "line 1, column 4: a number of more than 100 characters"),
        ("a: 1\nb: 2024-99-99", "line 2, column 4: '2024-99-99' cannot be read: month must be in 1..12"),
        ("a: !!bool x", "line 1, column 4: 'x' cannot be read"),
        ("a: !!python/object/apply:os.getcwd []", "line 1, column 4: could not determine a constructor"),
        ("a: 1\nb: [c", r"line 2, column 6: expected ',' or '\]'.*which began in line 2"),
        ("a: 1\nb: \x1b[0m", r"line 2: the character U\+001B is not allowed"),
        ("a: *x", "line 1, column 4: found undefined alias 'x'"),
        ("[a]: b", "line 1, column 1: found unhashable key"),
    ],
)
def test_what_is_refused_is_refused_quickly_in_one_line(text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "data.yaml", ("names",))
    assert str(caught.value).startswith("data.yaml: not valid YAML: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - start < 20


def test_values_are_counted_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvision.storage.yaml_files.MAX_NODES", 100)
    assert parse_yaml("[" + "a," * 99 + "]", "data.yaml") == ["a"] * 99
    with pytest.raises(UserError, match="line 1, column 200: more than 100 values"):
        parse_yaml("[" + "a," * 1000 + "]", "data.yaml")


def test_files_that_are_no_yaml(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(UserError, match="config a: no such file or directory"):
        read_yaml(file, "config a")
    with pytest.raises(UserError, match="config a: not a file"):
        read_yaml(tmp_path, "config a")
    file.write_bytes(b"names: [a]\nx: K\xe4fer\n")
    with pytest.raises(
        UserError, match=r"config a: not text in UTF-8 \(byte 0xe4 in line 2\).*cp1252.*save it as UTF-8"
    ):
        read_yaml(file, "config a")
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match=r"config a: not text in UTF-16"):
        read_yaml(file, "config a")
    file.write_bytes(b"\x00\x01\x02\x03" * 9)
    with pytest.raises(UserError, match=r"config a: not text: it has zero bytes"):
        read_yaml(file, "config a")
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="config a: larger than 2 MiB"):
        read_yaml(file, "config a")
    file.write_bytes(b"")
    assert read_yaml(file, "config a") is None
