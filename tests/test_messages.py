"""What decoders print about damaged pictures stays away from the terminal; everything else arrives."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mvision.structures import messages
from mvision.structures.messages import decoder_messages_hidden
from tests.coco_files import picture

# The module is run from its file: importing the package takes seconds.
CODE = """
import os, runpy, sys
import cv2, numpy as np
decoder_messages_hidden, hide_library_messages = (
    runpy.run_path(sys.argv[2])[name] for name in ("decoder_messages_hidden", "hide_library_messages")
)
def work():
    assert cv2.imdecode(np.fromfile(sys.argv[1], np.uint8), 1) is not None
    print("python", file=sys.stderr)
    os.write(2, b"another library\\n")
"""


def damaged_jpeg(path: Path) -> Path:
    """A picture that libjpeg complains about and decodes."""
    _, data = cv2.imencode(".jpg", picture(200, 300))
    damaged = bytearray(data.tobytes())
    rng = np.random.default_rng(1)
    for place in rng.integers(800, len(damaged) - 2, size=8):
        damaged[place] = 0xFF
        damaged[place + 1] = 0
    for place in range(len(damaged) // 2, len(damaged) // 2 + 200):
        damaged[place] ^= 0x55
    path.write_bytes(damaged)
    return path


def standard_error(tmp_path: Path, code: str) -> list[str]:
    command = [sys.executable, "-c", CODE + code, str(damaged_jpeg(tmp_path / "a.jpg")), messages.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()


def test_decoders_are_quiet_and_others_are_heard(tmp_path: Path) -> None:
    plain = standard_error(tmp_path, "work()")
    assert any(line.startswith("Corrupt JPEG data") for line in plain)
    hidden = standard_error(tmp_path, "with decoder_messages_hidden(): work()\nwork()")
    assert hidden[:2] == ["python", "another library"]  # and what follows the block is as before
    assert sum(line.startswith("Corrupt JPEG data") for line in hidden) == 1
    error = standard_error(tmp_path, "with decoder_messages_hidden(): work(); 1 / 0")
    assert error[-1] == "ZeroDivisionError: division by zero"
    assert "another library" in error
    worker = standard_error(tmp_path, "hide_library_messages(); work(); 1 / 0")
    assert worker[0] == "python"
    assert worker[-1] == "ZeroDivisionError: division by zero"
    assert not any(line.startswith(("Corrupt", "another")) for line in worker)


def test_a_stream_of_the_callers_stays_his(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    stream = sys.stderr
    with decoder_messages_hidden():
        assert sys.stderr is stream
        print("heard", file=sys.stderr)
    assert capsys.readouterr().err == "heard\n"
    monkeypatch.setattr(sys, "stderr", None)  # a program without a terminal
    with decoder_messages_hidden():
        pass
