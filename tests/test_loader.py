"""Batches: the same whoever loads them, every image once, damage named, processes that start and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision.commands import early
from mvision.config import AugmentConfig, DataConfig
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.data.loading.batch import Batch
from mvision.data.loading.loader import Loader, build_eval_loader, build_train_loader, pick_workers
from mvision.data.loading.samplers import EvalBatches, TrainBatches
from mvision.errors import UserError
from tests.coco_files import PEOPLE, annotation, coco, write_set

SQUARE = [[8.0, 8.0, 28.0, 8.0, 28.0, 24.0, 8.0, 24.0]]
SIZE = (64, 96)
EXTRA = [{"name": "Rotate", "args": {"limit": 20}}, {"name": "GaussNoise", "args": {"p": 1.0}}]
STRONG = AugmentConfig.model_validate({"mosaic": 0.5, "mixup": 0.5, "multi_scale": 0.4, "extra": EXTRA})


def split_of(root: Path, images: int = 10, fields: tuple[str, ...] = ("boxes",)) -> CocoSplit:
    points = {"keypoints": [10, 10, 2, 12, 10, 2, 0, 0, 0]}
    entries = [
        annotation(n, category_id=1, segmentation=SQUARE, **points) for n in range(1, images) for _ in range(n % 3)
    ]
    entries.append(annotation(2, category_id=1, iscrowd=1, segmentation=SQUARE))
    write_set(root, coco(entries, PEOPLE, images=images))
    return CocoSplit(find_layout(root).split("train"), fields)


def train(split: CocoSplit, workers: int = 0, batch_size: int = 4, **more: Any) -> Loader:
    config = DataConfig(augment=more.pop("augment", STRONG), workers=workers)
    return build_train_loader(split, config, batch_size=batch_size, image_size=SIZE, **more)


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(a.images, b.images), *((x.boxes, y.boxes) for x, y in zip(a.targets, b.targets))]
    pairs += [(x.masks, y.masks) for x, y in zip(a.targets, b.targets) if x.masks is not None and y.masks is not None]
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


def test_batches_hold_what_the_model_takes(tmp_path: Path) -> None:
    split = split_of(tmp_path, fields=("boxes", "masks", "keypoints"))
    batches = list(train(split, augment=AugmentConfig()).epoch(0))
    assert len(batches) == 2
    for batch in batches:
        assert batch.images.shape == (4, 3, *SIZE)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert len(batch.targets) == 4
        for targets in batch.targets:
            count = len(targets)
            assert targets.boxes.shape == (count, 4)
            assert targets.areas.shape == (count,)
            assert targets.masks is not None
            assert targets.masks.shape == (count, SIZE[0] // 2, SIZE[1] // 2)
            assert targets.keypoints is not None
            assert targets.keypoints.shape == (count, 3, 3)
        moved = batch.to("cpu")
        assert torch.equal(moved.images, batch.images)


def test_workers_change_nothing(tmp_path: Path) -> None:
    split = split_of(tmp_path, fields=("boxes", "masks"))
    alone, together = train(split), train(split, workers=2)
    try:
        for epoch in (0, 1, 5):
            pairs = list(zip(alone.epoch(epoch), together.epoch(epoch), strict=True))
            assert len(pairs) == 2
            assert all(equal(a, b) for a, b in pairs)
    finally:
        together.close()


def test_an_epoch_can_be_left_early(tmp_path: Path) -> None:
    split = split_of(tmp_path)
    alone, together = train(split, batch_size=2), train(split, workers=1, batch_size=2)
    try:
        next(iter(together.epoch(0)))
        assert all(equal(a, b) for a, b in zip(alone.epoch(1), together.epoch(1), strict=True))
    finally:
        together.close()


def test_epochs_are_shuffled_and_repeatable() -> None:
    batches = TrainBatches(20, 5, SIZE, seed=3)

    def order(epoch: int) -> list[int]:
        batches.epoch = epoch
        return [key.index for keys in batches for key in keys]

    assert sorted(order(0)) == list(range(20))
    assert order(0) != order(1)
    assert order(0) == order(0)
    batches.epoch = 7
    assert {key.epoch for keys in batches for key in keys} == {7}


@pytest.mark.parametrize(("images", "batch_size", "world"), [(20, 6, 2), (20, 6, 3), (20, 5, 2), (3, 8, 2), (2, 8, 4)])
def test_processes_share_the_batches_of_one(images: int, batch_size: int, world: int) -> None:
    scales = AugmentConfig(multi_scale=0.4)
    alone = list(TrainBatches(images, batch_size, SIZE, augment=scales))
    ranks = [
        list(TrainBatches(images, batch_size, SIZE, augment=scales, rank=r, world_size=world)) for r in range(world)
    ]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for number, keys in enumerate(alone):
        parts = [batches[number] for batches in ranks]
        assert all(parts), "a process without work"
        assert {key.index for part in parts for key in part} == {key.index for key in keys}
        assert {key.image_size for part in parts for key in part} == {keys[0].image_size}
        if len(keys) >= world:
            assert sum(map(len, parts)) == len(keys)


def test_a_data_set_smaller_than_a_batch_makes_one_batch() -> None:
    batches = TrainBatches(3, 16, SIZE)
    assert len(batches) == 1
    assert [sorted(key.index for key in keys) for keys in batches] == [[0, 1, 2]]


def test_the_last_epochs_are_at_the_size_of_predictions() -> None:
    batches = TrainBatches(40, 2, (320, 320), epochs=10, augment=AugmentConfig(multi_scale=0.25, last_epochs=0.2))
    sizes = []
    for batches.epoch in range(10):
        sizes.append({key.image_size for batch in batches for key in batch})
    assert all(len(found) > 1 for found in sizes[:8])
    assert sizes[8:] == [{(320, 320)}] * 2


def test_multi_scale_sizes_are_multiples_of_32_in_proportion() -> None:
    batches = TrainBatches(400, 2, (320, 640), augment=AugmentConfig(multi_scale=0.25))
    sizes = {keys[0].image_size for keys in batches}
    assert len(sizes) > 4
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert 480 <= width <= 800
        assert abs(height - width / 2) <= 16
    assert {keys[0].image_size for keys in TrainBatches(40, 2, (320, 640))} == {(320, 640)}


def test_evaluation_sees_every_image_once(tmp_path: Path) -> None:
    split = split_of(tmp_path)
    config = DataConfig(workers=0)
    seen: Counter[int] = Counter()
    for rank in range(3):
        loader = build_eval_loader(split, config, batch_size=4, image_size=SIZE, rank=rank, world_size=3)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen.update(targets.image_id for batch in batches for targets in batch.targets)
    assert seen == Counter(range(1, 11))
    assert [key.index for keys in EvalBatches(5, 2, SIZE) for key in keys] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path: Path, workers: int) -> None:
    split = split_of(tmp_path)
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    loader = train(split, workers, batch_size=10, augment=AugmentConfig())
    (batch,) = loader.epoch(0)
    loader.close()
    assert len(batch) == 10
    assert [Path(file).name for file, _ in batch.skipped] == ["3.png"]

    evaluated = build_eval_loader(split, DataConfig(workers=workers), batch_size=1, image_size=SIZE)
    batches = list(evaluated)
    evaluated.close()
    assert sum(len(b) for b in batches) == 9
    assert [Path(file).name for b in batches for file, _ in b.skipped] == ["3.png"]
    assert [b.images.shape[0] for b in batches] == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


def test_files_that_cannot_be_read_are_named_once_and_counted(tmp_path: Path) -> None:
    split = split_of(tmp_path)
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    trained = train(split, batch_size=10, augment=AugmentConfig())
    evaluated = build_eval_loader(split, DataConfig(workers=0), batch_size=1, image_size=SIZE)
    assert trained.missing() is evaluated.missing() is None
    for loader in (trained, evaluated):
        named = [file for epoch in range(3) for batch in loader.epoch(epoch) for file, _ in batch.skipped]
        assert [Path(file).name for file in named] == ["3.png"]
    file = tmp_path / "images" / "3.png"
    assert trained.missing() == f"1 training image could not be read, replaced by others 4 times: {file}"
    assert evaluated.missing() == f"1 validation image could not be read, left out of the figures: {file}"


def test_nothing_readable_is_one_clear_error(tmp_path: Path) -> None:
    split = split_of(tmp_path, images=3)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of a whole batch can be read.*the file is empty"):
        list(train(split).epoch(0))


def test_an_epoch_without_any_object(tmp_path: Path) -> None:
    write_set(tmp_path, coco([], images=4))
    split = CocoSplit(find_layout(tmp_path).split("train"))
    (batch,) = train(split).epoch(0)
    assert [len(targets) for targets in batch.targets] == [0, 0, 0, 0]


def test_a_killed_worker_is_one_clear_error(tmp_path: Path) -> None:
    loader = train(split_of(tmp_path), workers=1, batch_size=1)
    next(loader.epoch(0))
    (worker,) = loader._loader._iterator._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a loading process ended unexpectedly.*--workers"):
        _ = [list(loader.epoch(number)) for number in range(1, 100)]
    loader.close()


SCRIPT = """
    import sys, time
    from mvision.config import DataConfig
    from mvision.data import CocoSplit, build_train_loader, find_layout

    # No `if __name__ == "__main__"`: workers must not run the script again.
    print("started", flush=True)
    split = CocoSplit(find_layout(sys.argv[1]).split("train"))
    loader = build_train_loader(split, DataConfig(workers=1), batch_size=4, image_size=(64, 64))
    for epoch in range(10_000):
        for batch in loader.epoch(epoch):
            worker, = loader._loader._iterator._workers
            if epoch == 0:
                print(worker.pid, flush=True)
        time.sleep(0.05)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals to a process group")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_workers_end_with_the_main_process(tmp_path: Path, kill: signal.Signals) -> None:
    split_of(tmp_path / "set")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "set")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        worker = int(process.stdout.readline())
        if kill == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.kill()
        _, errors = process.communicate(timeout=120)  # every process that holds the pipes has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert errors.count("KeyboardInterrupt") == (kill == signal.SIGINT), "workers have nothing to say about Ctrl-C"
    assert not _alive(worker)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals")
def test_a_program_ends_while_its_loader_still_has_workers(tmp_path: Path) -> None:
    """They ignore SIGTERM, with which multiprocessing ends what is left of them before it waits for them."""
    split_of(tmp_path / "set")
    script = """
        import sys
        from mvision.config import DataConfig
        from mvision.data import CocoSplit, build_train_loader, find_layout

        split = CocoSplit(find_layout(sys.argv[1]).split("train"))
        loader = build_train_loader(split, DataConfig(workers=1), batch_size=1, image_size=(64, 64))
        iterator = loader.epoch(0)
        next(iterator)
        raise SystemExit(3)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "set")]
    assert subprocess.run(command, timeout=60).returncode == 3


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_workers(3, on_cuda=False) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert pick_workers(None, on_cuda=True) == 7
    assert pick_workers(None, on_cuda=True, world_size=4) == 1
    assert pick_workers(None, on_cuda=False) == 2
    assert pick_workers(None, on_cuda=False, world_size=4) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert pick_workers(None, on_cuda=True) == 0


@pytest.mark.skipif(os.name != "posix", reason="the sharer listens on a Unix socket")
def test_a_worker_is_silent_when_the_main_process_breaks_off() -> None:
    """Ctrl-C can hit the main process while it fetches a batch from a worker's sharing thread."""
    script = textwrap.dedent("""
        import socket, sys, time
        from multiprocessing import resource_sharer
        from mvision.data.loading.loader import init_worker

        if sys.argv[1] == "worker":
            init_worker(0)
        resource_sharer._resource_sharer.register(print, print)
        sharer = resource_sharer._resource_sharer
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(sharer._address)
                time.sleep(0.2)  # the sharer's greeting arrives and is never read
        time.sleep(0.2)
    """)
    reported = {}
    for kind in ("plain", "worker"):
        child = subprocess.run([sys.executable, "-c", script, kind], capture_output=True, text=True, timeout=120)
        assert child.returncode == 0, child.stderr
        reported[kind] = child.stderr
    assert "Error" in reported["plain"]  # else nothing is shown here
    assert reported["worker"] == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server of worker processes")
def test_workers_import_nothing_themselves(tmp_path: Path) -> None:
    """The server has done it, also where only the calling program knows where the package lies."""
    script = """
        import os, sys
        sys.path[:0] = os.environ["PLACES"].split(os.pathsep)

        if __name__ == "__main__":
            from mvision.data.loading.workers import worker_context
            answers = worker_context().Pool(1)
            print(answers.apply(eval, ("'mvision.data.loading.loader' in __import__('sys').modules",)))
            print(answers.apply(os.getenv, ("OMP_NUM_THREADS",)), os.getenv("OMP_NUM_THREADS"))
            answers.close()  # terminate() sends SIGTERM, which workers never see, and waits for their end
            answers.join()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    places = os.pathsep.join(path for path in sys.path if path)
    variables = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-S", str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**variables, "PLACES": places},
    )
    assert done.stdout.split() == ["True", "1", "None"], done.stderr


@pytest.mark.parametrize(
    ("workers", "assignments", "config", "started"),
    [
        (None, (), False, True),
        (2, (), True, True),
        (0, (), False, False),
        (None, (), True, False),
        (None, ("train.lr=1e-4", "data.workers=0"), False, False),
    ],
)
def test_the_server_is_started_before_the_imports_of_a_training(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, assignments: tuple[str, ...], config: bool, started: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(early, "worker_context", lambda: calls.append(1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    early.expect_workers(workers, assignments, config)
    assert bool(calls) == started
