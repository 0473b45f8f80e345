"""Prediction with one model in several threads, and in processes that are forked after a prediction."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvision import Model, create_model, load
from mvision.inference.predict import MOST_PASSES, eval_mode, forward_passes
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
    ("threads", "images", "own", "expected"),
    [
        (2, None, False, (2, 1)),
        (2, 1, False, (1, 2)),
        (9, 50, False, (MOST_PASSES, 9 // MOST_PASSES)),
        (1, None, False, (1, 1)),
        (2, None, True, (1, 1)),
    ],
)
def test_threads_are_divided_among_forward_passes(
    threads: int, images: int | None, own: bool, expected: tuple[int, int]
) -> None:
    model, before = FakeModel(), torch.get_num_threads()
    model.own_threads = own
    torch.set_num_threads(threads)
    try:
        with forward_passes(model, images) as passes:
            assert (passes, torch.get_num_threads()) == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


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
    score = float(model.predict([picture], 0.0)[0].scores[0])
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
