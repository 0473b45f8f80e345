"""The serving example, over loopback."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mvision.structures import Instances
from mvision.weights import save_weights
from tests.test_joint import make_model

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "serve.py"


class Server(NamedTuple):
    """The example's module, its port, and the numbers of pictures of its forward passes."""

    module: ModuleType
    port: int
    batches: list[int]

    def post(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/predict", body, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(["detection", "instance-seg"])
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 96))
    weights = tmp_path_factory.mktemp("serve") / "best.safetensors"
    save_weights(model.eval(), weights)
    batches: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVISION_WEIGHTS", str(weights))
        spec = importlib.util.spec_from_file_location("serve_example", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "serve_example", module)
        spec.loader.exec_module(module)
        predict = module.model.predict

        def counted(images: Any, threshold: float = 0.0, **options: Any) -> list[Instances]:
            batches.append(len(images))
            time.sleep(0.05)  # so that others wait meanwhile
            return predict(images, threshold, precision="fp32", **options)

        patch.setattr(module.model, "predict", counted)
        serving = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="error", lifespan="on"))
        thread = threading.Thread(target=serving.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not serving.started:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.02)
        yield Server(module, serving.servers[0].sockets[0].getsockname()[1], batches)
        serving.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "it ends when it is told to"


def png(seed: int, size: tuple[int, int] = (70, 50)) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue(), pixels


def check(answer: dict[str, Any], pixels: np.ndarray, server: Server) -> None:
    (expected,) = server.module.model.predict([pixels])
    assert answer["size"] == list(pixels.shape[:2])
    entries = expected.to_coco(None)
    assert len(answer["objects"]) == len(entries) > 0
    assert [entry["name"] for entry in answer["objects"]] == [expected.names[k] for k in expected.labels]
    for name, tolerance in (("score", 1e-4), ("bbox", 1e-2)):
        found = [entry[name] for entry in answer["objects"]]
        np.testing.assert_allclose(found, [entry[name] for entry in entries], atol=tolerance)
    assert all("segmentation" in entry for entry in answer["objects"])


def test_an_upload_gives_what_predict_gives(server: Server) -> None:
    data, pixels = png(0)
    status, answer = server.post(data)
    assert status == 200
    check(answer, pixels, server)


@pytest.mark.parametrize("what", ["text", "nothing", "truncated"])
def test_what_is_no_picture_is_refused_and_the_server_goes_on(server: Server, what: str) -> None:
    data, pixels = png(1)
    body = {"text": b"no picture", "nothing": b"", "truncated": data[: len(data) // 2]}[what]
    before = len(server.batches)
    status, answer = server.post(body)
    assert status == 400
    assert answer["detail"].startswith("this picture cannot be used: ")
    assert str(Path(os.sep, "tmp")) not in answer["detail"]
    assert len(server.batches) == before
    assert server.post(data)[0] == 200


@pytest.mark.parametrize("told", [True, False])
def test_too_much_is_refused_whether_its_size_is_told_or_not(
    server: Server, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = png(2)
    monkeypatch.setattr(server.module, "MAX_BYTES", len(data) - 1)
    status, answer = server.post(data if told else iter([data[:100], data[100:]]))
    assert (status, answer["detail"]) == (413, f"the picture has more than {len(data) - 1:,} bytes")
    monkeypatch.setattr(server.module, "MAX_BYTES", len(data))
    assert server.post(data)[0] == 200


def test_clients_at_the_same_time_share_forward_passes(server: Server) -> None:
    pictures = [png(seed, (60 + seed, 50 + 2 * seed)) for seed in range(12)]
    server.batches.clear()
    with ThreadPoolExecutor(len(pictures)) as clients:
        answers = list(clients.map(lambda picture: server.post(picture[0]), pictures))
    assert sum(server.batches) == len(pictures)
    assert 1 < max(server.batches) <= server.module.MAX_BATCH
    assert len(server.batches) < len(pictures)
    for (status, answer), (_, pixels) in zip(answers, pictures):
        assert status == 200
        check(answer, pixels, server)


def test_a_failure_is_that_of_its_batch_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pixels = png(3)

    def fail(images: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.module.model, "predict", fail)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/predict", data)
        assert connection.getresponse().status == 500
        connection.close()
    status, answer = server.post(data)
    assert status == 200
    check(answer, pixels, server)
