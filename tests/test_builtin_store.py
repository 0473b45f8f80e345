"""The built-in data set on disk: made once, never half-written, whatever happens to the process that makes it."""

import os
import threading
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from mvision.builtin import drawing, ensure_builtin, generate_image, store
from mvision.errors import UserError


def test_existing_set_is_reused_and_a_damaged_one_replaced(tmp_path: Path):
    folder = ensure_builtin(tmp_path, train=3, val=2)
    stamp = folder.stat().st_ino
    assert ensure_builtin(tmp_path, train=3, val=2).stat().st_ino == stamp
    next((folder / "images").glob("*.jpg")).unlink()
    assert ensure_builtin(tmp_path, train=3, val=2) == folder
    assert len(list((folder / "images").glob("*.jpg"))) == 5
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_settings_and_versions_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = ensure_builtin(tmp_path, train=2, val=1)
    assert ensure_builtin(tmp_path, train=2, val=1, seed=1) != first
    assert ensure_builtin(tmp_path, train=2, val=2) != first
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    assert ensure_builtin(tmp_path, train=2, val=1) != first


def test_default_place_is_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "TRAIN_IMAGES", 2)
    monkeypatch.setattr(store, "VAL_IMAGES", 1)
    calls: list[tuple[int, int]] = []
    folder = ensure_builtin(train=2, val=1, progress=lambda done, total: calls.append((done, total)))
    assert folder == tmp_path / "cache" / "builtin-v1"
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def fail(seed: int, index: int, split: str):
        if index == 2:
            raise error
        return generate_image(seed, index, split)

    monkeypatch.setattr(drawing, "generate_image", fail)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
    with pytest.raises(expected) as caught:
        ensure_builtin(tmp_path, train=6, val=1)
    if expected is UserError:
        assert str(tmp_path) in str(caught.value)
        assert "MVISION_CACHE" in str(caught.value)
        assert "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert ensure_builtin(tmp_path, train=6, val=1).is_dir()


def test_no_process_goes_on_drawing_after_an_error_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(done: int, total: int) -> None:
        raise ValueError("stop")

    workers = []
    monkeypatch.setattr(drawing, "cores", lambda: 2)
    monkeypatch.setattr(drawing, "_start", lambda *a, start=drawing._start: workers.append(start(*a)) or workers[-1])
    with pytest.raises(ValueError, match="stop") as caught:
        ensure_builtin(tmp_path, train=400, val=1, progress=stop)
    assert caught.tb is not None  # its frames are alive, as they are while an error is on its way up
    assert len(workers) == 2
    assert all(worker.poll() is not None for worker in workers)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="MVISION_CACHE"):
        ensure_builtin(tmp_path / "file", train=1, val=1)


def test_two_at_once(tmp_path: Path):
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(ensure_builtin(tmp_path, train=4, val=2))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 2
    assert [p.name for p in tmp_path.iterdir()] == [results[0].name]
    assert len(COCO(str(results[0] / "annotations" / "val.json")).imgs) == 2


def test_leftovers_of_killed_processes_are_cleared(tmp_path: Path):
    old, fresh = tmp_path / ".builtin-v1-aaaa", tmp_path / ".builtin-v1-bbbb"
    for path in (old, fresh):
        (path / "images").mkdir(parents=True)
    os.utime(old, (0, 0))
    ensure_builtin(tmp_path, train=1, val=1)
    assert not old.exists()
    assert fresh.exists()
