"""``mvision demo`` without a browser and without gradio: what is found, what the page says, and its mistakes."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mvision.cli.main import run
from mvision.commands import demo as command
from mvision.commands import predict as predict_command
from mvision.deploy import demo_html, demo_model
from mvision.deploy.demo_html import look
from mvision.deploy.demo_model import Found, Row
from mvision.errors import UserError
from mvision.structures import Category
from tests.demo_models import BAD, PAINTED, TickedModel, painted
from tests.demo_models import demo_model as make
from tests.fake_model import paint, save

RED, GREEN = ("red", (20, 10, 50, 50)), ("green", (90, 60, 18, 15))


def found_in(found: Found) -> list[tuple[str, tuple[int, ...]]]:
    return [(row.name, tuple(round(value) for value in row.box)) for row in found.rows]


def test_objects_and_the_drawn_picture(tmp_path: Path) -> None:
    found = make().find(painted(tmp_path), ["detection"], 0.4)
    assert found_in(found) == [RED, GREEN]
    assert found.size == found.picture.shape[:2] == (96, 128)
    assert 0 < found.seconds < 60
    assert (found.picture != PAINTED).any()
    assert found.rows[0].score == 1
    assert found.rows[0].colour == (255, 64, 64)
    assert found_in(make().find(painted(tmp_path), ["detection"], 0.5)) == [RED]


def test_a_large_picture_is_drawn_small_and_its_boxes_are_in_its_own_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "SHOWN_SIDE", 64)
    large = save(tmp_path / "large.png", PAINTED.repeat(3, axis=0).repeat(3, axis=1))
    found = make().find(large, ["detection"], 0.5)
    assert (found.size, found.picture.shape) == ((288, 384), (48, 64, 3))
    assert found_in(found) == [("red", (60, 30, 150, 150))]


def test_ticked_tasks(tmp_path: Path) -> None:
    """A head that serves detection gives masks too: they are drawn where its own task is ticked."""
    model = make("detection", "instance-seg", "keypoints")
    file = painted(tmp_path)
    boxes = model.find(file, ["detection"], 0.5)
    masks = model.find(file, ["instance-seg"], 0.5)
    every = model.find(file, model.tasks, 0.5)
    assert found_in(boxes) == found_in(masks) == found_in(every)
    pictures = [boxes.picture, masks.picture, every.picture]
    assert all((one != other).any() for one, other in zip(pictures, [*pictures[1:], pictures[0]]))
    inside = (slice(30, 40), slice(60, 68))  # neither an outline nor a label lies here
    assert (boxes.picture[inside] == PAINTED[inside]).all()
    assert model._model.asked[1:] == [["detection"], ["instance-seg"], model.tasks]  # type: ignore[attr-defined]


def test_passes_take_turns(tmp_path: Path) -> None:
    class Slow(TickedModel):
        running = most = 0

        def forward(self, images):  # type: ignore[no-untyped-def]
            Slow.running += 1
            Slow.most = max(Slow.most, Slow.running)
            threading.Event().wait(0.02)
            Slow.running -= 1
            return super().forward(images)

    thread = ThreadPoolExecutor(1)
    models = [demo_model.DemoModel(name, Slow(), "", thread) for name in "ab"]  # type: ignore[arg-type]
    file = painted(tmp_path)
    with ThreadPoolExecutor(4) as people:
        results = list(people.map(lambda model: model.find(file, ["detection"], 0.4), models * 4))
    assert Slow.most == 1
    assert all(found_in(found) == [RED, GREEN] for found in results)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line(kind: str, tmp_path: Path) -> None:
    model, (make_file, line) = make(), BAD[kind]
    picture, facts, table = look([model], str(make_file(tmp_path)), ["detection"], 0.5)
    assert (picture, table) == (None, "")
    assert 'class="mv-line mv-bad"' in facts
    assert facts.count("<div") == 1
    assert line in facts
    assert str(tmp_path) not in facts
    assert look([model], str(painted(tmp_path)), ["detection"], 0.5)[0] is not None


def test_more_pixels_than_the_page_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "MOST_PIXELS", 96 * 128 - 1)
    with pytest.raises(UserError, match=r"^street\.png: 128 x 96 pixels are too many .* mvision predict --tile$"):
        make().find(painted(tmp_path), ["detection"], 0.5)


def test_two_models_side_by_side(tmp_path: Path) -> None:
    models = [make(name="one"), make("keypoints", name="two")]
    shown = look(models, str(painted(tmp_path)), ["detection", "keypoints"], 0.4)
    assert len(shown) == 6
    assert "<b>2</b> objects" in shown[1]
    assert (shown[0] != shown[3]).any()  # the second one draws points
    shown = look(models, str(painted(tmp_path)), ["keypoints"], 0.4)
    assert shown[:3] == (None, demo_html.line("Tick one of its tasks: detection."), "")
    assert isinstance(shown[3], np.ndarray)
    assert look(models, None, ["detection"], 0.5)[0] is None


def test_the_table_and_the_facts() -> None:
    rows = [
        Row("red", 0.914, (1.4, 2, 30, 40), (255, 64, 64)),
        Row("sky", 0.5, (0, 0, 128, 20), (1, 2, 3), region=True),
    ]
    table = demo_html.table(rows)
    cells = re.findall(r"<td>(?:<[^>]*>)*([^<]+)", table)
    assert cells == ["red", "0.91", "1", "2", "30", "40", "sky (region)", "0.50", "0", "0", "128", "20"]
    assert "rgb(255, 64, 64)" in table
    assert "threshold" in demo_html.table([])
    facts = demo_html.facts(Found(PAINTED, rows, 0.01234, (96, 128), ["first frame"]))
    texts = re.sub(r"<[^>]+>", " ", facts).split()
    assert " ".join(texts) == "forward pass 12.3 ms 1 object 1 class of regions 128 × 96 pixels first frame"


def test_names_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    model = TickedModel()
    model.config.categories = [Category(id=1, name=evil)]
    about = demo_html.about(demo_model.DemoModel(evil, model, evil, ThreadPoolExecutor(1)))  # type: ignore[arg-type]
    row = Row(evil, 0.5, (0, 0, 1, 1), (0, 0, 0))
    facts = demo_html.facts(Found(PAINTED, [row, row._replace(name="b")], 0.1, (1, 1), [evil]))
    for text in (about, demo_html.table([row]), facts, demo_html.line(evil), demo_html.line(evil, bad=True)):
        assert "<img" not in text
        assert "&lt;img" in text


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert refused(capsys) == "the package gradio is missing: pip install 'gradio>=6' (mvision's extra [demo])"


@pytest.mark.usefixtures("installed")
def test_a_port_that_is_taken(taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--weights", "nowhere", "--port", str(taken))
    assert line.startswith(f"--port {taken}: taken by another program; choose another, such as {taken + 1}")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--host", "300.0.0.1", "--weights", "x"], "--host 300.0.0.1: "),
        (["--host", "192.0.2.1", "--weights", "x"], "--host 192.0.2.1: not an address of this machine"),
        (["--weights", "a", "--weights", "b", "--weights", "c"], "--weights: 3 were given; the page compares 2"),
        (["--task", "detecton"], "unknown task 'detecton': did you mean 'detection'?"),
        (["--port", "70000"], "invalid value for '--port'"),
    ],
)
def test_wrong_options(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    assert refused(capsys, *arguments, *port).startswith(line)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("weights", [["--weights", "nowhere"], [], ["--task", "keypoints"]])
def test_weights_are_refused_as_by_predict(weights: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *weights, "--port", "0")
    assert run(["predict", *weights]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.usefixtures("installed")
def test_the_newest_run_and_pictures_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page itself is replaced by a note of what it is given."""
    monkeypatch.setattr(command, "newest_run", lambda tasks: Path("runs/detection/7"))
    monkeypatch.setattr(command, "open_fastest", lambda source, *given, **more: (TickedModel(), f"runs {source}"))
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(command, "sample_images", lambda source, count: [f"{source}/{n}.jpg" for n in range(count)])
    served: list[tuple] = []
    monkeypatch.setattr(command, "_serve", lambda *given: served.append(given))
    monkeypatch.setattr(command, "is_at_hand", lambda root: True)
    assert run(["demo", "--port", "0"]) == 0
    (models, examples, listener, _), name = served.pop(), str(Path("runs/detection/7"))
    assert [model.name for model in models] == [name]
    assert examples == [f"{name}/{n}.jpg" for n in range(6)]
    assert listener.fileno() == -1  # closed at the end
    assert f"{name}: runs {name}" in capsys.readouterr().out
    monkeypatch.setattr(command, "is_at_hand", lambda root: root is not None)
    assert run(["demo", "--weights", "a", "--weights", "b", "--port", "0"]) == 0
    assert [model.name for model in served[0][0]] == ["a", "b"]
    assert served[0][1] == []
    assert "no example pictures: the built-in data set is not on this machine" in capsys.readouterr().out


def test_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert command._address("127.0.0.1", listener) == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)"
        assert "every machine that reaches this one can open it" in command._address("0.0.0.0", listener)
        assert command._address("::1", listener).startswith(f"http://[::1]:{port}/")


def test_the_built_in_set_is_not_generated_for_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path))
    examples, (line,) = command._examples("dfine-s")
    assert examples == []
    assert "not on this machine" in line
    assert list(tmp_path.iterdir()) == []
    assert predict_command.SAMPLES  # predict, without a source, does generate it


def test_a_deep_picture_says_that_its_range_was_guessed(tmp_path: Path) -> None:
    deep = save(tmp_path / "deep.png", (paint((40, 40), [])[..., 0].astype(np.uint16) * 257))
    assert "more than 8 bits" in look([make()], str(deep), ["detection"], 0.5)[1]
