"""The actors of a prediction on Ray Data: each holds the model, and predicts on what the reading stage has made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mvision.errors import UserError
from mvision.inference.output import result_values
from mvision.inference.predict import eval_mode, infer
from mvision.inference.selection import Selection
from mvision.inference.shard_stages import Columns
from mvision.machine import keep_freed_memory
from mvision.structures import Instances

if TYPE_CHECKING:
    import ray


@dataclass(frozen=True)
class ActorSettings:
    """How an actor computes.

    Attributes:
        device: of PyTorch; with a GPU the only one that Ray shows to the actor.
        threads: of PyTorch on a CPU.
        batch_size: pictures in a forward pass; None: 1 on a CPU, else 8.
        chosen: which results are kept.
    """

    device: str
    threads: int
    batch_size: int | None
    chosen: Selection


class PredictStage:
    """An actor: it opens the model once, and predicts on batches."""

    def __init__(self, model: ray.ObjectRef[Any], settings: ActorSettings) -> None:
        """Open the model.

        Args:
            model: a ``PortableModel`` in Ray's object store, where all actors of a machine share it.
        """
        import ray

        keep_freed_memory()
        torch.set_num_threads(settings.threads)
        device = torch.device(settings.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU on a machine of the cluster that Ray says has one")
        self.model = ray.get(model).open(device)
        self.settings = settings

    def __call__(self, batch: Columns) -> Columns:
        """``number``, ``problem`` and ``notes`` as they came, and ``rows``: the entries of each picture as JSON."""
        columns = zip(batch["number"], batch["image"], batch["height"], batch["width"], batch["problem"])
        prepared = [
            (int(number), None if problem else np.require(image, requirements=["C", "W"]), (int(height), int(width)))
            for number, image, height, width, problem in columns
        ]
        with eval_mode(self.model):
            results = infer(self.model, prepared, [self.settings.chosen], self.settings.batch_size, len(prepared))
            found = {number: None if each is None else each[0] for number, each in results}
        rows = [
            _rows(int(number), str(name), found[int(number)], str(problem))
            for number, name, problem in zip(batch["number"], batch["name"], batch["problem"])
        ]
        return {
            "number": batch["number"],
            "rows": np.array([json.dumps(each) for each in rows], dtype=object),
            "problem": batch["problem"],
            "notes": batch["notes"],
        }


def _rows(number: int, name: str, found: Instances | None, problem: str) -> list[dict[str, Any]]:
    """The rows of a picture in its shard; pictures are numbered from 1 there, as in ``predictions.json``."""
    where: dict[str, Any] = {"image_id": number + 1, "file_name": name}
    if found is None:
        return [{**where, "error": problem}]
    names = found.class_names + ([] if found.regions is None else found.regions.class_names)
    return [
        {**where, "category_id": entry["category_id"], "category_name": category, **result_values(entry)}
        for entry, category in zip(found.to_coco(number + 1), names, strict=True)
    ]
