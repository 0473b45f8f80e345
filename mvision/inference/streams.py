"""URLs as sources: pictures and videos of web servers, and live streams. Which are opened, with what limits.

A file or a stream may name others: a playlist its parts, a script of ffmpeg's ``concat`` any file at all. So ffmpeg is
told which protocols and which formats it may use: nothing but the file itself for a file, and nothing on this machine
for a URL.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mvision.errors import UserError
from mvision.structures.images import IMAGE_SUFFIXES

TIMEOUT = 10.0  # seconds without an answer after which a host is given up
MAX_DOWNLOAD = 256 << 20  # bytes of a picture
MAX_SECONDS = 60.0  # for downloading a picture
# Scheme -> the protocols that it needs. None of them reads files of this machine.
_WEB = "http,https,httpproxy,tcp,tls,crypto"
PROTOCOLS = {
    "http": _WEB,
    "https": _WEB,
    "rtsp": "rtsp,rtp,rtcp,udp,tcp",
    "rtsps": "rtsp,rtsps,rtp,rtcp,srtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,rtmp,tls,tcp",
    "udp": "udp",
    "rtp": "rtp,rtcp,udp",
    "srt": "srt",
}
# Formats whose pictures are in the file itself. Not among them: playlists and scripts that open other files (concat,
# dash, hls, imf, sdp), devices, and the numbered files of image2.
FORMATS = (
    "3gp,apng,asf,av1,avi,avs2,avs3,cavsvideo,dirac,dnxhd,dv,flv,gif,gxf,h261,h263,h264,hevc,ivf,kux,live_flv,m4v,"
    "matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,swf,vc1,vvc,webm,wtv,yuv4mpegpipe"
)
STREAM_FORMATS = f"{FORMATS},dash,hls,mpjpeg,rtp,rtsp,sdp"
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_UNSAFE = re.compile(r"[^\w.-]+")


def is_url(text: str) -> bool:
    """Whether a source is written as a URL, of any scheme."""
    return _URL.match(text) is not None


def check_url(url: str) -> None:
    """Raise a ``UserError`` for a scheme that is not read, or a URL without a host."""
    scheme = url.partition("://")[0].lower()
    if scheme == "file":
        raise UserError(f"source {url}: give the path without file://")
    if scheme not in PROTOCOLS:
        raise UserError(f"source {hide_password(url)}: '{scheme}' is not read; only {', '.join(PROTOCOLS)}, and files")
    try:
        host = urlsplit(url).hostname
        _ = urlsplit(url).port
    except ValueError as error:
        raise UserError(f"source {hide_password(url)}: not a URL ({error})") from error
    if not host and scheme != "udp":
        raise UserError(f"source {hide_password(url)}: a URL without a host")


def hide_password(text: str) -> str:
    """A URL without the name and password in front of its host; other text as it is."""
    return re.sub(r"(?i)^([a-z][a-z0-9+.-]+://)[^/?#]*@", r"\1***@", text)


def name_of_url(url: str) -> str:
    """A file name for the results: the last part of the path, else the host."""
    parts = urlsplit(url)
    last = PurePosixPath(unquote(parts.path)).name or parts.hostname or parts.scheme
    return _UNSAFE.sub("_", last).strip(".")[-100:] or "stream"


def is_picture(url: str) -> bool:
    """Whether a URL is a single picture, as its server says; others are videos or streams.

    Raises:
        UserError: the server does not answer, or answers with an error or a web page.
    """
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        return False
    with _answer(url) as response:
        kind = response.headers.get_content_type()
    if kind == "text/html":
        raise UserError(f"source {hide_password(url)}: a web page, neither a picture nor a video")
    if kind.startswith("image/"):
        return True
    ending = PurePosixPath(urlsplit(url).path).suffix.lower()
    return kind in ("application/octet-stream", "text/plain") and ending in IMAGE_SUFFIXES


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """A picture in a temporary file, which is removed at the end of the block.

    Raises:
        UserError: the server does not answer, or the picture is too large or takes too long.
    """
    ending = PurePosixPath(urlsplit(url).path).suffix
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{ending if ending.lower() in IMAGE_SUFFIXES else ''}"
        started, size = time.monotonic(), 0
        with _answer(url) as response, path.open("wb") as file:
            while piece := response.read1(1 << 20):
                size += len(piece)
                if size > MAX_DOWNLOAD:
                    raise UserError(f"source {hide_password(url)}: more than {MAX_DOWNLOAD >> 20} MB for one picture")
                if time.monotonic() - started > MAX_SECONDS:
                    raise UserError(f"source {hide_password(url)}: not complete after {MAX_SECONDS:.0f} s")
                file.write(piece)
        yield path


def ffmpeg_input(path: str, is_stream: bool) -> tuple[str, dict[str, Any]]:
    """The name that ffmpeg is to open, and the arguments of ``av.open``."""
    if is_stream:
        scheme = urlsplit(path).scheme.lower()
        options = {"protocol_whitelist": PROTOCOLS[scheme], "format_whitelist": STREAM_FORMATS}
        if scheme.startswith("rtsp"):
            options["rtsp_flags"] = "prefer_tcp"  # over UDP, lost packets damage pictures
        return path, {"container_options": options, "timeout": (TIMEOUT, TIMEOUT)}
    # With the protocol in front, a colon in a file's name is not taken for one.
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    return f"file:{os.path.abspath(path)}", {"container_options": options}  # noqa: PTH100 - keeps links


@contextmanager
def _answer(url: str) -> Iterator[http.client.HTTPResponse]:
    """The answer of a web server; errors of the connection, also within the block, become a ``UserError``."""
    shown = hide_password(url)
    try:
        with _opener().open(_request(url), timeout=TIMEOUT) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise UserError(f"source {shown}: the server answers {error.code} ({_one_line(error.reason)})") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"no answer within {TIMEOUT:.0f} s"
        elif isinstance(reason, OSError):
            reason = reason.strerror or reason
        raise UserError(f"source {shown}: cannot be reached ({_one_line(reason) or type(error).__name__})") from error


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())


def _request(url: str) -> urllib.request.Request:
    """A request, with the name and password of the URL where the protocol wants them."""
    parts = urlsplit(url)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    request = urllib.request.Request(quote(address, safe="%/:=&?~+!$,;'@()*[]"), headers={"User-Agent": "mvision"})
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Not for the host that the answer may send us on to.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(credentials).decode()}")
    return request


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone: also a redirection may not lead to files or to other protocols."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
