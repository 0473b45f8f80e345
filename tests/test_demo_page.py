"""The page of ``mvision demo``, served: by HTTP, and in a headless Chromium where there is one."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from mvision.deploy.demo_model import DemoModel
from mvision.weights import save_weights
from tests.demo_models import BAD, PAINTED, demo_model, painted
from tests.fake_model import paint, save
from tests.test_joint import make_model

pytest.importorskip("gradio")
from mvision.deploy import demo_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITH_A_CAMERA = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextmanager
def served(models: Sequence[DemoModel], examples: Sequence[str] = ()) -> Iterator[str]:
    """The address of the page, in a thread of this process."""
    started: list[Any] = []

    class Server(demo_page._Server):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.append(self)

    ready = threading.Event()
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(demo_page, "_Server", Server)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread = threading.Thread(target=demo_page.serve, args=(models, examples, listener, ready.set))
        thread.start()
        assert ready.wait(120)
        yield address
        started[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def outside_recorded() -> Iterator[list[str]]:
    """The hosts that this process looks up or connects to, but for this machine."""
    asked: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host: Any) -> None:
        if host not in ("127.0.0.1", "localhost", "::1", None):
            asked.append(str(host))

    def connecting(self: socket.socket, address: Any) -> Any:
        note(address[0] if isinstance(address, tuple) else None)
        return connect(self, address)

    def looking_up(host: Any, *more: Any, **named: Any) -> Any:
        note(host)
        return look_up(host, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", looking_up)
        yield asked


def test_two_people_get_their_own_results_and_nobody_else_is_asked(tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    files = [painted(tmp_path), save(tmp_path / "blue.png", paint((96, 128), [(2, (5, 5, 55, 50))]))]
    with outside_recorded() as asked, served([demo_model()]) as address:
        assert asked == []
        quiet: Any = {"verbose": False, "analytics_enabled": False, "httpx_kwargs": {"timeout": 120}}
        people = [Client(address, download_files=str(tmp_path / f"of_{n}"), **quiet) for n in range(2)]
        asked.clear()  # the client asks Hugging Face for a list, once; the browser, which people use, is watched below

        def ask(turn: int) -> str:
            who = turn % 2
            _, facts, table = people[who].predict(handle_file(files[who]), ["detection"], 0.4, api_name="/find")
            assert "forward pass" in facts
            return " ".join(re.findall("red|green|blue", table))

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(ask, range(8))) == ["red green", "blue"] * 4
        for client in people:
            client.close()
    assert asked == []


def test_an_upload_that_is_too_large_is_refused_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_page, "MOST_BYTES", 10_000)

    def upload(size: int) -> str:
        body = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n--x--\r\n' % bytes(
            size
        )
        headers = {"content-type": "multipart/form-data; boundary=x"}
        with urlopen(Request(f"{address}gradio_api/upload", body, headers), timeout=60) as answer:
            return answer.read().decode()

    with served([demo_model()]) as address:
        with pytest.raises(HTTPError, match="413"):
            upload(20_000)
        assert "a.png" in upload(5_000)


def test_the_page_may_load_its_own_files_alone() -> None:
    with served([demo_model()]) as address, urlopen(address, timeout=60) as answer:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; ")
        assert not re.search(r"https?:|\*", policy)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_ends_it(number: int, code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    save_weights(make_model(["detection"]), tmp_path / "weights.safetensors")
    arguments = ["--weights", "weights.safetensors", "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "mvision", "demo", *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        address = next(text for text in process.stdout if text.startswith("http://127.0.0.1:"))
        with urlopen(address.split()[0], timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.strip() == f"stopped by {line}"
    assert list((tmp_path / "temporary").glob("mvision-demo-*")) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=WITH_A_CAMERA)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, address: str) -> Iterator[Any]:
    """A page that asked nobody but the server."""
    asked: list[str] = []
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(90_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []


def upload(page: Any, file: Path) -> None:
    clear = page.locator("#picture button[aria-label='Remove Image']")
    if clear.count():
        clear.click()
    page.locator("#picture input[type=file]").first.set_input_files(file)


def text_of(page: Any, part: str, model: int = 0) -> str:
    return page.locator(f"#model-{model} .{part}").last.inner_text()


def expect(page: Any, part: str, pattern: str, model: int = 0) -> str:
    """The text of a part of the page, when it matches."""
    place = page.locator(f"#model-{model} .{part}", has_text=re.compile(pattern, re.S))
    place.first.wait_for()
    return text_of(page, part, model)


def test_upload_threshold_and_bad_files(browser: Any, tmp_path: Path) -> None:
    with served([demo_model()]) as address, opened(browser, address) as page:
        upload(page, painted(tmp_path))
        assert "forward pass" in expect(page, "mv-facts", "1 object")
        assert " ".join(expect(page, "mv-rows", "red").split()) == "class score x y width height red 1.00 20 10 50 50"
        shown = page.locator("#model-0 .mv-result img")
        assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [128, 96]
        number = page.locator("#threshold input[type=number]")
        number.fill("0.4")
        number.press("Tab")
        assert "green 0.44 90 60 18 15" in " ".join(expect(page, "mv-rows", "green").split())
        for make, line in BAD.values():
            upload(page, make(tmp_path))
            assert "\n" not in expect(page, "mv-bad", re.escape(line))
        upload(page, painted(tmp_path, "again.png"))
        expect(page, "mv-facts", "2 objects")


def test_examples_a_webcam_and_uploads_that_are_too_large(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_page, "MOST_BYTES", 1_000_000)
    files = [str(painted(tmp_path)), str(save(tmp_path / "blue.png", paint((96, 128), [(2, (5, 5, 55, 50))])))]
    with served([demo_model()], files) as address, opened(browser, address) as page:
        expect(page, "mv-rows", "red")  # the first example is shown when the page opens
        page.locator("button.gallery-item").nth(1).click()
        expect(page, "mv-rows", "blue")
        page.locator("#picture button[aria-label='Remove Image']").click()
        expect(page, "mv-facts", "Upload a picture")
        (tmp_path / "large.png").write_bytes(bytes(2_000_000))
        upload(page, tmp_path / "large.png")
        page.get_by_text("exceed the maximum allowed size").first.wait_for()
        page.locator("#picture button[aria-label='Capture from camera']").click()
        page.locator("#picture button", has_text=re.compile("ebcam")).first.click()
        page.locator("#picture button[aria-label='capture photo']").click()
        expect(page, "mv-facts", "forward pass")


def test_two_models_and_ticked_tasks(browser: Any, tmp_path: Path) -> None:
    models = [demo_model(name="runs/detection/1"), demo_model("instance-seg", "keypoints", name="runs/joint/1")]
    with served(models, [str(save(tmp_path / "a.png", PAINTED))]) as address, opened(browser, address) as page:
        for number, name in enumerate(("runs/detection/1", "runs/joint/1")):
            expect(page, "mv-rows", "red", number)
            assert name in page.locator(f"#model-{number}").inner_text()
        page.locator("#tasks label", has_text="detection").click()
        expect(page, "mv-facts", "Tick one of its tasks: detection", 0)
        expect(page, "mv-rows", "red", 1)
