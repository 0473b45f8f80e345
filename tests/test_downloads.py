"""Downloads: what is said before, what is compared after, and what is left of one that went wrong.

The Hub is played by functions, a web host by a server on this machine that is spoken to without encryption.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import LocalEntryNotFoundError

from mvision.errors import UserError
from mvision.storage import download, hub
from mvision.storage.download import download_file
from mvision.storage.hub import download_repository

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789" * 4


class _Encrypted(urllib.request.HTTPSHandler):
    """Speaks to the test's server without encryption, whatever the scheme says."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(http.client.HTTPConnection, req)


class _Host(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/elsewhere.pth":
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host']}/model.pth")
            self.end_headers()
            return
        if self.path == "/missing.pth":
            self.send_error(404)
            return
        self.send_response(200)
        kind = "text/html; charset=utf-8" if self.path.startswith("/page") else "application/octet-stream"
        self.send_header("Content-Type", kind)
        if not self.path.startswith("/unknown"):
            self.send_header("Content-Length", str(10**12 if self.path == "/huge.pth" else len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 1000 if self.path == "/cut.pth" else None])

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(urllib.request, "HTTPSHandler", _Encrypted)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    _Host.asked = []
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", ["model.pth", "unknown.pth"])
def test_a_file_is_downloaded_once(host: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    target = tmp_path / "new" / name
    for _ in range(2):
        assert download_file(f"{host}/{name}?key=secret", target, said.append, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert len(_Host.asked) == 1
    assert [line for line in said if "secret" in line] == []
    size = "1.3 MB" if name == "model.pth" else "unknown size"
    assert said == [f"downloading https://127.0.0.1/{name}: {size}, into {target.parent}"]
    assert name in capsys.readouterr().err  # the progress bar


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.pth", "cut off after 1000 of 1280000 bytes; try again"),
        ("missing.pth", "cannot be downloaded .*Not Found.* save it as .*missing.pth$"),
        ("elsewhere.pth", "cannot be downloaded .*unknown url type: http"),
        ("page.pth", "a web page, not a file of weights"),
        ("huge.pth", "1,000,000 MB or more to download; 8,590 MB is the limit"),
        ("model.pth", f"another file than expected .SHA-256 {SHA256}, not 00"),
    ],
)
def test_nothing_is_left_of_what_went_wrong(host: str, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        download_file(f"{host}/{name}", tmp_path / name, lambda line: None, "00")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_does_not_say_the_size_cannot_fill_the_disk(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 10**6)
    monkeypatch.setattr(download, "_CHUNK", 10**5)
    with pytest.raises(UserError, match="1.1 MB or more to download"):
        download_file(f"{host}/unknown.pth", tmp_path / "unknown.pth", lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.pth", "ftp://127.0.0.1/a.pth", "file:///etc/passwd"])
def test_only_https(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="over https only"):
        download_file(url, tmp_path / "a.pth")


def test_names_and_passwords_are_not_shown() -> None:
    assert download.shown_url("https://me:secret@host:8/a/b.pth?token=secret") == "https://host/a/b.pth"


class _Hub:
    """A Hub with one repository, and the cache of its client."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.snapshots, self.asked = cache, cache / "snapshots", 0
        self.content = {"config.json": b"{}", "model.safetensors": CONTENT, "pytorch_model.bin": b"pickle"}
        self.sha256 = SHA256

    def model_info(self, name: str, **options: Any) -> Any:
        self.asked += 1
        lfs = SimpleNamespace(sha256=self.sha256)
        siblings = [
            SimpleNamespace(rfilename=file, size=len(data), lfs=lfs if file == "model.safetensors" else None)
            for file, data in self.content.items()
        ]
        return SimpleNamespace(sha=options["revision"] or COMMIT, siblings=siblings)

    def snapshot_download(
        self,
        name: str,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        folder = self.snapshots / (revision or COMMIT)
        if local_files_only or constants.HF_HUB_OFFLINE:
            if not folder.is_dir():
                raise LocalEntryNotFoundError("nothing in the cache")
            return str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in self.content.items():
            if file in (allow_patterns or ()):
                (folder / file).write_bytes(data)
        return str(folder)

    def in_cache(self, name: str, file: str, revision: str) -> str | None:
        path = self.snapshots / revision / file
        return str(path) if path.is_file() else None


@pytest.fixture
def a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    played = _Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(played.cache))
    monkeypatch.setattr(hub, "_reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **o: played.model_info(name, **o))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", played.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", played.in_cache)
    return played


def _get(revision: str | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    files = ("config.json", "model.safetensors")
    return download_repository("me/model", files, lambda folder: (folder / files[1]).is_file(), revision, say)


def test_size_and_commit_are_said_before_a_download(a_hub: _Hub) -> None:
    said: list[str] = []
    for _ in range(2):
        folder = _get(say=said.append)
    assert said == [f"downloading https://huggingface.co/me/model at {COMMIT}: 1.3 MB, into {a_hub.cache}"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert a_hub.asked == 2  # whether there is a newer commit
    assert hub.cached_commit("me/model") == COMMIT


def test_a_pinned_revision_needs_the_network_once(a_hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = "f" * 40
    assert _get(pin).name == pin
    monkeypatch.setattr(hub, "_reachable", lambda url: pytest.fail("the network was used"))
    assert _get(pin).name == pin
    assert a_hub.asked == 1
    (a_hub.snapshots / pin / "model.safetensors").unlink()  # as an interrupted download leaves it
    monkeypatch.setattr(hub, "_reachable", lambda url: True)
    assert (_get(pin) / "model.safetensors").is_file()


def test_what_was_damaged_on_the_way_is_removed(a_hub: _Hub) -> None:
    a_hub.sha256 = "1" * 64
    with pytest.raises(UserError, match="model.safetensors was damaged on the way .*has been removed; try again"):
        _get()
    assert not (a_hub.snapshots / COMMIT / "model.safetensors").exists()
    a_hub.sha256 = SHA256
    assert (_get() / "model.safetensors").is_file()


def test_the_limit_holds_for_the_hub_too(a_hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_BYTES", 10**6)
    with pytest.raises(UserError, match="1.3 MB to download, and 1.0 MB is the limit"):
        _get()
    assert not a_hub.snapshots.exists()


def test_without_network_the_cache_is_taken(a_hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    _get()
    monkeypatch.setattr(hub, "_reachable", lambda url: False)
    assert _get().name == COMMIT
    monkeypatch.setattr(hub, "_reachable", lambda url: True)

    def no_answer(self: object, name: str, **options: object) -> None:
        raise ConnectionError("a proxy that answers for everybody")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    assert _get().name == COMMIT
    with pytest.raises(ConnectionError):
        _get("e" * 40)
