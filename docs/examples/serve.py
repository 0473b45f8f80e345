"""A model behind HTTP. Pictures that arrive together are predicted together, and each client gets its own answer.

::

    pip install -e ".[serve]"
    MVISION_WEIGHTS=runs/detection/1 uvicorn --app-dir docs/examples --limit-concurrency 64 serve:app
    curl --data-binary @street.jpg http://127.0.0.1:8000/predict
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request

import mvision
from mvision.structures.images import BadImage, read_image

MAX_BYTES = 20_000_000  # of an upload
MAX_BATCH = 8  # pictures in a forward pass
MAX_WAIT = 0.01  # seconds that a picture waits for others

model = mvision.load(os.environ["MVISION_WEIGHTS"], device=os.environ.get("MVISION_DEVICE", "cpu"))
waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[Any]]] = asyncio.Queue()


async def predict_batches() -> None:
    """Take what waits, predict it in a thread, and hand every result to its own request."""
    while True:
        batch = [await waiting.get()]
        if waiting.qsize() < MAX_BATCH - 1:
            await asyncio.sleep(MAX_WAIT)
        batch += [waiting.get_nowait() for _ in range(min(waiting.qsize(), MAX_BATCH - 1))]
        try:
            results = await asyncio.to_thread(model.predict, [image for image, _ in batch], batch_size=len(batch))
            for (_, answer), result in zip(batch, results):
                if not answer.done():
                    answer.set_result(result)
        except Exception as error:  # noqa: BLE001  # these requests fail, the next ones are served
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await asyncio.to_thread(model.predict, np.zeros((*model.config.image_size, 3), np.uint8))  # the first call is slow
    task = asyncio.create_task(predict_batches())
    yield
    task.cancel()


app = FastAPI(title="mvision", lifespan=lifespan)


def decode(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB with all checks of ``mvision predict``; MVISION_MAX_IMAGE_BYTES limits the decoded size."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "upload").write_bytes(data)
        return read_image(path, pixel_range=model.config.pixel_range)


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    """What is in the picture that is the body of the request: entries of COCO's result format with class names."""
    data = bytearray()
    async for part in request.stream():  # counted as it arrives: a header can be missing or wrong
        data += part
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"the picture has more than {MAX_BYTES:,} bytes")
    try:
        image = await asyncio.to_thread(decode, bytes(data))
    except BadImage as error:
        raise HTTPException(400, f"this picture cannot be used: {error.reason}") from error
    answer = asyncio.get_running_loop().create_future()
    await waiting.put((image, answer))
    names = {category.id: category.name for category in model.config.categories}
    objects = (await answer).to_coco(None)
    return {"size": image.shape[:2], "objects": [{**entry, "name": names[entry["category_id"]]} for entry in objects]}
