"""Prediction with one model in several threads, and in processes that are forked after a prediction."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvision import Model, create_model, load
from mvision.inference.passes import MOST_PASSES, forward_passes
from mvision.inference.pipeline import ordered_map
from mvision.inference.predict import eval_mode, predict_images
from mvision.weights import save_weights
from tests.fake_model import FakeModel

ROOT = Path(__file__).resolve().parent.parent
IMAGES = [np.random.default_rng(seed).integers(0, 255, (50, 70, 3), np.uint8) for seed in range(6)]


def small_model() -> Model:
    torch.manual_seed(0)
    model = create_model("tiny", ["detection"], num_classes=3, image_size=64, neck__embed_dim=32)
    with torch.no_grad():  # statistics for which evaluation and training mode give different results
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += torch.rand_like(buffer)
    return model


def results(model: Any, image: np.ndarray) -> list[np.ndarray]:
    (found,) = model.predict([image], 0.0)
    return [found.boxes, found.scores, found.labels]


@pytest.mark.parametrize("kind", ["in training", "in evaluation", "loaded"])
def test_threads_get_the_serial_results_and_leave_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    model = small_model()
    if kind == "loaded":
        save_weights(model, tmp_path / "w.safetensors")
        model = load(tmp_path / "w.safetensors")
    model.train(kind == "in training")
    model.neck.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [results(model, image) for image in IMAGES]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda number: results(model, IMAGES[number % len(IMAGES)]), range(24)))
    for number, values in enumerate(found):
        assert all(map(np.array_equal, values, expected[number % len(IMAGES)]))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("threads", "batches", "expected"),
    [(2, None, (2, 1)), (2, 1, (1, 2)), (9, 50, (MOST_PASSES, 9 // MOST_PASSES)), (1, None, (1, 1)), (4, 0, (1, 4))],
)
def test_threads_are_divided_among_forward_passes(threads: int, batches: int | None, expected: tuple[int, int]) -> None:
    assert forward_passes(threads, batches) == expected


def test_a_runtime_with_threads_of_its_own_and_a_single_batch_compute_in_the_callers_thread() -> None:
    with of_torch(2):
        for own, batch_size, expected in ((True, None, True), (False, 6, True), (False, 3, False)):
            model, seen = FakeModel(), []
            model.own_threads = own
            model.register_forward_hook(lambda *_, seen=seen: seen.append(threading.get_ident()))
            predict_images(model, IMAGES, 0.0, batch_size)
            assert (set(seen) == {threading.get_ident()}) == expected


@contextlib.contextmanager
def of_torch(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_list_is_predicted_by_several_passes_and_the_program_keeps_its_threads() -> None:
    """Also the threads of the program that begin to compute during a prediction, and later."""
    model = small_model()
    expected = [predict_images(model, image, 0.0)[0] for image in IMAGES]
    seen: list[tuple[int, int]] = []
    elsewhere: list[int] = []

    def look(*_: Any) -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()

    with of_torch(2):
        predict_images(model, IMAGES[:2], 0.0)  # starts the threads of the passes
        model.register_forward_hook(look)
        with ThreadPoolExecutor(3) as executor:
            found = list(executor.map(lambda _: predict_images(model, IMAGES, 0.0), range(3)))
        assert {threads for _, threads in seen} == {1}
        assert len({thread for thread, _ in seen}) == 2  # also of three predictions at once
        assert {*elsewhere, torch.get_num_threads()} == {2}
        assert list(ordered_map(lambda _: torch.get_num_threads(), range(2), 1)) == [2, 2]
    for predictions in found:
        for one, alone in zip(predictions, expected, strict=True):
            np.testing.assert_allclose(one.boxes, alone.boxes, atol=1e-3)
            np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)


def test_an_error_in_a_pass_is_raised_and_the_next_prediction_works() -> None:
    model = small_model()

    def fail(*_: Any) -> None:
        raise ValueError("in a pass")

    with of_torch(2):
        hook = model.register_forward_hook(fail)
        with pytest.raises(ValueError, match="in a pass"):
            predict_images(model, IMAGES, 0.0)
        hook.remove()
        assert len(predict_images(model, IMAGES, 0.0)) == len(IMAGES)


def test_passes_take_the_autocast_of_the_caller() -> None:
    model = small_model()
    types: list[torch.dtype] = []
    model.neck.register_forward_hook(lambda _module, _inputs, outputs: types.append(outputs[0].dtype))
    with of_torch(2):
        with torch.autocast("cpu", torch.bfloat16):
            predict_images(model, IMAGES[:2], 0.0)
        predict_images(model, IMAGES[:2], 0.0)
    assert types == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_the_mode_lasts_until_the_last_thread_has_left() -> None:
    model = FakeModel().train()
    second = eval_mode(model)
    with ThreadPoolExecutor(1) as executor:
        with eval_mode(model):
            executor.submit(second.__enter__).result()
            assert not model.training
        assert not model.training  # the first has left, the second has not
        executor.submit(second.__exit__, None, None, None).result()
    assert model.training
    assert model.part.training


def test_an_error_in_one_thread_leaves_the_others_their_mode() -> None:
    model = FakeModel().train()
    with eval_mode(model):
        with pytest.raises(ValueError, match="of one thread"), eval_mode(model):
            raise ValueError("of one thread")
        assert not model.training
    assert model.training


FORKED = """
import multiprocessing, sys
import numpy as np, torch
torch.set_num_threads(2)
from mvision import create_model
torch.manual_seed(0)
model = create_model("tiny", ["detection"], num_classes=3, image_size=96, neck__embed_dim=32).eval()
picture = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
def predict(queue=None):
    score = float(model.predict([picture] * 3, 0.0)[2].scores[0])
    return score if queue is None else queue.put((score, torch.get_num_threads()))
first = predict()
context = multiprocessing.get_context("fork")
queue = context.Queue()
workers = [context.Process(target=predict, args=(queue,), daemon=True) for _ in range(1)]
for worker in workers:
    worker.start()
for worker in workers:
    score, threads = queue.get(timeout=60)
    assert abs(score - first) < 1e-5, (score, first)
    assert threads == 1
assert torch.get_num_threads() == 2
print("done", abs(predict() - first) < 1e-5)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
def test_processes_forked_after_a_prediction_predict() -> None:
    """With two threads of OpenMP in the parent, the first product in the child would wait for them for ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.stdout.split() == ["done", "True"], done.stderr
