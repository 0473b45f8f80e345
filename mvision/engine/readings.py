"""Loss terms and gradients' flags, left on the device by the steps of a training and read rarely.

Reading a number makes the CPU wait until the GPU has done all that was queued before it, and then the GPU waits for the
CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mvision.compat import copy_all
from mvision.structures.transfer import to_host


class Readings:
    """What the steps since the last ``read`` have left.

    Attributes:
        sums: of every loss term, by the name under which it is logged, over all batches that were read.
    """

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float, sums)
        self._terms: list[tuple[list[str], Tensor]] = []
        self._steps: list[tuple[int, Tensor]] = []

    def add_terms(self, names: Sequence[str], values: Tensor) -> None:
        """Note the loss terms of a batch.

        Args:
            names: ``task/NAME_LAYER_KIND``.
            values: (len(names),) float32.
        """
        self._terms.append(([_logged_name(name) for name in names], values.detach()))

    def add_step(self, number: int, found_inf: Tensor) -> None:
        """Note whether the gradient of an optimiser step was not finite: () float, 1 if so."""
        self._steps.append((number, found_inf))

    def read(self) -> list[tuple[int, bool]]:
        """Add the terms to the sums, in the order of the batches; returns whether each step's gradient was finite."""
        tensors = {f"terms {index}": values for index, (_, values) in enumerate(self._terms)}
        if self._steps:
            tensors["steps"] = torch.stack([found_inf for _, found_inf in self._steps])
        read = to_host(tensors)
        for index, (names, _) in enumerate(self._terms):
            for name, value in zip(names, read[f"terms {index}"].tolist()):
                self.sums[name] += value
        found = read["steps"].tolist() if self._steps else []
        finite = [(number, found_inf == 0) for (number, _), found_inf in zip(self._steps, found)]
        self._terms, self._steps = [], []
        return finite


def _logged_name(term: str) -> str:
    """The name under which a loss term ``task/NAME_LAYER_KIND`` is logged, ``task/KIND_NAME``: summed over layers."""
    task, _, rest = term.partition("/")
    parts = rest.split("_")
    kind = next((part for part in parts[1:] if not part.isdigit()), "decoder")
    return f"{task}/{kind}_{parts[0]}"


class BufferGuard:
    """The running means of norms, as they were after the last step with a finite gradient.

    A forward pass that overflows puts NaN into them, where it would stay: no later step can remove it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.buffers:
            # All of them in one tensor: choosing between two values is then one operation.
            self._good = torch.cat([buffer.flatten() for buffer in self.buffers])
            self._now = self._good.clone()
            self._places_of_good, self._places_of_now = self._places(self._good), self._places(self._now)

    def update(self, found_inf: Tensor) -> None:
        """Take the values of now as good; where ``found_inf`` is 1, go back to the last good ones instead."""
        if self.buffers:
            copy_all(self._places_of_now, self.buffers)
            torch.where(found_inf.bool(), self._good, self._now, out=self._good)
            copy_all(self.buffers, self._places_of_good)

    def _places(self, values: Tensor) -> list[Tensor]:
        parts = values.split([buffer.numel() for buffer in self.buffers])
        return [part.view(buffer.shape) for part, buffer in zip(parts, self.buffers)]
