"""URLs as sources, and what files and streams may open: nothing of this machine but the file itself."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest

from mvision.errors import UserError
from mvision.inference import streams
from mvision.inference.predict_sources import predict_sources
from mvision.inference.reading import read_frames
from mvision.inference.sources import find_sources
from mvision.inference.streams import hide_password, name_of_url
from tests.fake_model import FakeModel, paint, save, written
from tests.test_inference_sources import write_video

RED = (0, (30, 20, 60, 60))


class Server:
    """A web server of this process. ``answers``: path -> (content type, content); ``asked``: what was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[str, bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                outer.asked.append((path, self.headers["Authorization"]))
                kind, content = outer.answers.get(path, ("", b""))
                if kind.startswith("redirect"):
                    self.send_response(302)
                    self.send_header("Location", content.decode())
                    self.end_headers()
                    return
                self.send_response(200 if kind else 404)
                if kind != "none":
                    self.send_header("Content-Type", kind or "text/plain")
                if not kind.startswith("multipart"):
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a host that takes connections and says nothing."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def png(tmp_path: Path) -> bytes:
    return save(tmp_path / "made" / "scene.png", paint((96, 128), [RED])).read_bytes()


def test_a_picture_and_a_video_of_a_web_server(server: Server, tmp_path: Path) -> None:
    server.answers["/photos/scene.png"] = ("image/png", png(tmp_path))
    server.answers["/plain"] = ("application/octet-stream", write_video(tmp_path / "clip.avi", frames=5).read_bytes())
    sources = [f"{server.url}/photos/scene.png?size=large&x=ä", f"{server.url}/plain"]
    summary = predict_sources(FakeModel().eval(), sources, tmp_path / "out", progress=False)
    assert summary.images == 6
    assert written(tmp_path / "out") == ["plain.mp4", "predictions.json", "scene.png"]
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entries[0]["file_name"] == "scene.png"
    with av.open(str(tmp_path / "out" / "plain.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_a_camera_that_sends_jpegs_one_after_another(server: Server, tmp_path: Path) -> None:
    jpeg = save(tmp_path / "made" / "scene.jpg", paint((96, 128), [RED])).read_bytes()
    part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)
    server.answers["/video"] = ("multipart/x-mixed-replace; boundary=frame", part * 6)
    summary = predict_sources(FakeModel().eval(), [f"{server.url}/video"], tmp_path / "out", progress=False)
    assert summary.images >= 5
    assert written(tmp_path / "out") == ["predictions.json", "video.mp4"]


def test_a_stream_that_breaks_off_keeps_what_it_gave(server: Server, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "clip.mkv", frames=40).read_bytes()
    server.answers["/live.mkv"] = ("video/x-matroska", whole[: len(whole) * 2 // 3])
    summary = predict_sources(FakeModel().eval(), [f"{server.url}/live.mkv"], tmp_path / "out", progress=False)
    assert 5 < summary.images < 40
    assert written(tmp_path / "out") == ["live.mp4", "predictions.json"]
    with av.open(str(tmp_path / "out" / "live.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == summary.images


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.jpg", r"the server answers 404"),
        ("/page", r"a web page, neither a picture nor a video"),
        ("/loop", r"the server answers 302|cannot be reached"),
        ("/to-file", r"the server answers 302|cannot be reached"),
    ],
)
def test_what_is_no_picture_is_one_line(server: Server, path: str, message: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    server.answers["/page"] = ("text/html; charset=utf-8", b"<html>")
    server.answers["/loop"] = ("redirect", b"/loop")
    server.answers["/to-file"] = ("redirect", f"file://{secret}".encode())
    with pytest.raises(UserError, match=message) as caught:
        find_sources([server.url + path])
    assert "\n" not in str(caught.value)


def test_a_host_that_is_silent_is_given_up(silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streams, "TIMEOUT", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached .no answer"):
        find_sources([f"http://{silent}/a.jpg"])
    for scheme in ("rtsp", "rtmp"):
        with pytest.raises(UserError, match=r"cannot be opened \("):
            list(read_frames(find_sources([f"{scheme}://{silent}/a"])))
    assert time.monotonic() - started < 8


def test_a_port_without_a_server_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="Connection refused"):
        find_sources([f"http://127.0.0.1:{port}/a.jpg"])
    with pytest.raises(UserError, match=r"rtsp://\*\*\*@127.0.0.1:\d+/cam: cannot be opened \(Connection refused\)"):
        list(read_frames(find_sources([f"rtsp://me:secret@127.0.0.1:{port}/cam"])))


def test_passwords_go_to_the_host_alone(server: Server, tmp_path: Path) -> None:
    other = Server()
    try:
        other.answers["/scene.png"] = ("image/png", png(tmp_path))
        server.answers["/scene.png"] = ("image/png", png(tmp_path))
        server.answers["/moved.png"] = ("redirect", f"{other.url}/scene.png".encode())
        address = server.url.replace("http://", "http://me:se%20cret@")
        sources = [f"{address}/scene.png", f"{address}/moved.png"]
        summary = predict_sources(FakeModel().eval(), sources, tmp_path / "out", progress=False)
        assert summary.images == 2
        assert {login for path, login in server.asked if path == "/scene.png"} == {"Basic bWU6c2UgY3JldA=="}
        assert {login for _, login in other.asked} == {None}
        for path in (tmp_path / "out").iterdir():
            assert b"cret" not in path.read_bytes()
            assert "cret" not in path.name
    finally:
        other.server.shutdown()
        other.server.server_close()
    assert hide_password("rtsp://a:b@host/x@y") == "rtsp://***@host/x@y"
    assert hide_password("photos/a@b.jpg") == "photos/a@b.jpg"


def test_names_of_results() -> None:
    urls = {
        "http://host/a/photo%20one.jpg?x=1": "photo_one.jpg",
        "rtsp://user:pw@10.0.0.1:554/": "10.0.0.1",
        "http://host/%2e%2e%2fetc": "etc",
        "https://host/..": "stream",
        "udp://@:1234": "udp",
    }
    for url, name in urls.items():
        assert name_of_url(url) == name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "give the path without file://"),
        ("ftp://host/a.jpg", "'ftp' is not read; only http, https, rtsp"),
        ("s3://bucket/a.jpg", "'s3' is not read"),
        ("http:///a.jpg", "a URL without a host"),
        ("http://host:port/a.jpg", "not a URL"),
        ("concat:a.mp4|b.mp4", "no such file or folder"),
        ("data:image/png;base64,AAAA", "no such file or folder"),
        ("subfile,,start,0,end,9,,:/etc/passwd", "no such file or folder"),
    ],
)
def test_other_protocols_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sources([url])


def test_a_file_cannot_open_others(server: Server, tmp_path: Path) -> None:
    """A playlist and a script of ffmpeg's, called .mp4, that name a file beside them and a web server."""
    (tmp_path / "private").mkdir()
    video = write_video(tmp_path / "private" / "clip.ts")
    server.answers["/clip.ts"] = ("video/mp2t", video.read_bytes())
    texts = {
        "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
        "script": "ffconcat version 1.0\nfile '{}'\n",
        "description": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 0 RTP/AVP 96\na={}\n",
    }
    for name, text in texts.items():
        for target in (str(video), f"{server.url}/clip.ts", "private/clip.ts"):
            trap = tmp_path / f"{name}.mp4"
            trap.write_text(text.format(target))
            with pytest.raises(UserError, match=r"not a video that can be read"):
                list(read_frames(find_sources([trap])))
    assert not server.asked


def test_a_stream_cannot_open_files_of_this_machine(server: Server, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.ts")
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n"
    server.answers["/list.m3u8"] = ("application/vnd.apple.mpegurl", text.encode())
    with pytest.raises(UserError, match="cannot be opened|without pictures"):
        list(read_frames(find_sources([f"{server.url}/list.m3u8"])))
    server.answers["/clip.ts"] = ("video/mp2t", video.read_bytes())
    server.answers["/list.m3u8"] = (
        "application/vnd.apple.mpegurl",
        text.replace(f"file://{video}", "clip.ts").encode(),
    )
    frames = list(read_frames(find_sources([f"{server.url}/list.m3u8"])))
    assert sum(frame.image is not None for frame in frames) == 10


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip 12:30.avi").write_bytes(write_video(tmp_path / "clip.avi", frames=3).read_bytes())
    frames = list(read_frames(find_sources(["clip 12:30.avi"])))
    assert [frame.image is not None for frame in frames] == [True] * 3
    assert np.asarray(frames[0].image).shape == (48, 64, 3)
