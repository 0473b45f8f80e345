"""What libjpeg, libpng and libtiff print about damaged pictures does not reach the user.

They write lines such as "Corrupt JPEG data: premature end of data segment" straight to the standard error of the
process, without the file's name, and go on. What they cannot read is reported as ``BadImage``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

FROM_DECODERS = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG|Invalid SOS parameters|libpng (warning|error)|Warning: unknown JFIF|"
    rb"tempfile\.tif|TIFF|LZWDecode|Fax\w+Decode|PixarLog|More samples per pixel than can be decoded|"
    rb"EstimateStripByteCounts|JPEGLib|OpenJPEG|\[ ?WARN:\d|\[ERROR:\d"
)


@contextmanager
def decoder_messages_hidden() -> Iterator[None]:
    """Keep decoders from writing to the terminal; other messages of libraries appear at the end of the block.

    Python's own output is not concerned. The block has to begin before a progress bar is made, which keeps the stream
    that it finds. To be used in one thread of a program, not in a library.
    """
    try:
        own = sys.stderr.fileno() == 2
    except (AttributeError, OSError, ValueError):  # no stream, or one that is no file
        own = False
    terminal, python = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as messages:
        if own:
            sys.stderr.flush()
            sys.stderr = os.fdopen(os.dup(terminal), "w", encoding=python.encoding, errors=python.errors, buffering=1)
        os.dup2(messages.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            if own:
                sys.stderr.close()
                sys.stderr = python
            messages.seek(0)
            for line in messages:
                if not FROM_DECODERS.search(line):
                    os.write(terminal, line)
            os.close(terminal)


def hide_library_messages() -> None:
    """For a process that only decodes pictures: nothing but Python's own messages reaches the terminal from now on."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - not a path of the user
        os.dup2(nowhere.fileno(), 2)
