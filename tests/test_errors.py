"""What becomes of an exception that a command raises, and texts that are safe to show."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mvision.cli.main import cli, run
from mvision.errors import Stopped, UserError, did_you_mean, printable, printable_lines, shortened
from mvision.evaluation.tables import text_table

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b2J": r"\x9b2J",
    "two\nlines\r\t": r"two\nlines\r\t",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066a\u2069\u2028": r"\u2066a\u2069\u2028",
    "\udcff\ud800": r"\udcff\ud800",
    "nul\x00, del\x7f": r"nul\x00, del\x7f",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_commands_of_a_terminal_are_written_out(name: str) -> None:
    assert printable(name) == HOSTILE[name]
    assert printable_lines(f"a\n{name}") == "a\n" + "\n".join(map(printable, name.split("\n")))


def test_names_in_all_scripts_stay_as_they_are() -> None:
    for name in (
        "cat",
        "C:\\data",
        "caf\u00e9",
        "\u732b",
        "\u0e41\u0e21\u0e27",
        "\u0628\u0637\u0629",
        "\U0001f408",
        "x\u00a0y",
    ):
        assert printable(name) == name


def test_a_suggestion_for_what_is_no_text() -> None:
    assert did_you_mean(5, ["detection", "keypoints"]) == "choose one of detection, keypoints"
    assert "detection" in did_you_mean(None, ["detection"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run; check that it ends with code 2 and one line on stderr, and return that line."""
    assert run(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1, line
    return line


class TestExceptions:
    """What becomes of an exception that a command raises."""

    @pytest.fixture
    def raising(self, monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
        """``mvision info`` raises the exception put into this list."""
        thrown: list[BaseException] = []

        def callback(**_: object) -> None:
            raise thrown[0]

        monkeypatch.setattr(cli.commands["info"], "callback", callback)
        return thrown

    def test_user_error_is_one_line(self, raising: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
        raising.append(UserError("first\nsecond"))
        assert refused(capsys, "info") == "error: first second\n"

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR])
    def test_the_file_system_refusing(
        self, code: int, raising: list[BaseException], capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising.append(OSError(code, os.strerror(code), "runs/1/best.safetensors"))
        assert refused(capsys, "info") == f"error: runs/1/best.safetensors: {os.strerror(code).lower()}\n"

    def test_a_full_disk_in_safetensors(self, raising: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
        raising.append(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
        assert "no space left" in refused(capsys, "info")

    def test_out_of_memory(self, raising: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
        import torch

        raising.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"))
        assert "smaller --batch-size" in refused(capsys, "info")

    def test_ctrl_c(self, raising: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
        raising.append(KeyboardInterrupt())
        assert run(["info"]) == 130
        assert capsys.readouterr().err.split("\n")[-2] == "stopped by Ctrl-C"

    def test_a_signal_has_its_exit_code_and_says_how_to_go_on(
        self, raising: list[BaseException], capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising.append(Stopped(signal.SIGTERM, "go on with: mvision train --resume runs/detection/1"))
        assert run(["info"]) == 143
        line = "stopped by SIGTERM; go on with: mvision train --resume runs/detection/1"
        assert capsys.readouterr().err.split("\n")[-2] == line

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (OSError(errno.EMFILE, "Too many open files", "a.png"), "a.png: too many open files"),
            (
                OSError(errno.ELOOP, "Too many levels of symbolic links", "loop"),
                "loop: too many levels of symbolic links",
            ),
            (OSError(errno.EIO, "Input/output error", b"disk\xff/x"), "disk\\udcff/x: input/output error"),
            (OSError(errno.EINVAL, "Invalid argument", "x"), "x: invalid argument"),
            (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), f"{'a' * 300}: file name too long"),
            (ValueError("embedded null byte"), "the name of a file or folder has a zero byte in it"),
            (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"), "no valid Unicode"),
            (RecursionError("maximum recursion depth exceeded"), "a file is nested too deeply"),
            (MemoryError(), "out of memory: a smaller --batch-size"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: a smaller"),
            (RuntimeError("std::bad_alloc"), "out of memory: a smaller"),
            (RuntimeError("PytorchStreamWriter failed writing file data/3"), "no space left on the disk"),
            (RuntimeError("can't start new thread"), "the system allows no further thread"),
        ],
    )
    def test_what_else_a_user_can_mend(
        self, error: Exception, line: str, raising: list[BaseException], capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising.append(error)
        assert line in refused(capsys, "info")

    @pytest.mark.parametrize("bug", [ValueError("x"), OSError(errno.EBADF, "x"), OSError("x"), AssertionError()])
    def test_bugs_keep_their_traceback(self, bug: BaseException, raising: list[BaseException]) -> None:
        raising.append(bug)
        with pytest.raises(type(bug)):
            run(["info"])


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in ``mvision info | head -0``, with output that the program has not flushed itself."""
    code = (
        "from mvision.cli.main import cli, main\n"
        "cli.commands['info'].callback = lambda **_: print('x' * {})\n"
        "main(['info'])"
    )
    for size in (10, 10_000_000):
        child = subprocess.Popen(
            [sys.executable, "-c", code.format(size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 1


@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("trian", 2)])
def test_closed_streams_lead_nowhere(arguments: str, code: int) -> None:
    for closed in (">&-", "2>&-"):
        command = f"{sys.executable} -m mvision {arguments} {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == code, (command, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_shows_its_number(encoding: str) -> None:
    """A class called so in somebody's data is no reason to end; nor is a name of a file that is no valid UTF-8."""
    code = (
        "from mvision.cli.main import cli, main\n"
        "from mvision.cli.options import echo\n"
        "cli.commands['info'].callback = lambda **_: (echo('\u732b \udcff \\x1b[31m'), print('\udcff'))\n"
        "main(['info'])"
    ).replace("\udcff", "\\udcff")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment, check=False)
    cat = "\u732b" if encoding == "utf-8" else r"\u732b"
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).splitlines() == [rf"{cat} \udcff \x1b[31m", r"\udcff"]


def test_an_error_about_a_hostile_name_is_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, shown in HOSTILE.items():
        if "\0" in name or "." in name or name.split() != [name]:
            continue
        assert shown in refused(capsys, "data", "check", name)
        assert shown in refused(capsys, "train", "-o", f"train.x{name}=1")
        assert shown in refused(capsys, "train", f"--{name}")
    for name in ("a\0b", "two\nlines", "a" * 5000):
        for arguments in (
            ["data", "check"],
            ["val", "--weights"],
            ["train", "--config"],
            ["train", "--init"],
            ["predict"],
        ):
            refused(capsys, *arguments, name)


def test_names_of_classes_are_shown_safely_and_kept_as_they_are(
    squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[31mred\n\u202e|x|"
    for file in (squares / "annotations").iterdir():
        file.write_text(file.read_text().replace('"name": "red"', f'"name": {json.dumps(name)}'))
    assert run(["data", "check", str(squares)]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[31mred\n\u202e|x|" in shown
    assert "\x1b" not in shown
    assert run(["data", "convert", str(squares), str(squares / "copy")]) == 0
    copied = json.loads((squares / "copy" / "annotations" / "val.json").read_text(encoding="utf-8"))
    assert [category["name"] for category in copied["categories"]] == ["blue", name]


def test_half_a_character_in_a_class_name_is_refused(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file in UTF-8 can hold it, and the evaluator cannot take it: an hour of training would end there."""
    file = squares / "annotations" / "train.json"
    file.write_text(file.read_text().replace('"red"', r'"red \ud83d"'))
    assert run(["data", "check", str(squares), "--split", "train"]) == 2
    assert r"category 5 has half a character in its name, 'red \ud83d'" in capsys.readouterr().out


def test_a_name_of_a_megabyte_does_not_fill_the_terminal(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abc...ijk"
    name = "red" * 300_000
    for file in (squares / "annotations").iterdir():
        file.write_text(file.read_text().replace('"name": "red"', f'"name": "{name}"'))
    assert run(["data", "check", str(squares)]) == 0
    assert len(capsys.readouterr().out) < 3000
    assert len(refused(capsys, "train", "--task", name)) < 5000
    assert max(map(len, text_table([["class", "AP"], [name, "0.500"]]))) < 100
