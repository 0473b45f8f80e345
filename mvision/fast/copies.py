"""Prepared copies of models: what ``Model.predict`` runs, while the model itself stays as it is and can be trained.

A copy belongs to a model, a device and a precision. It is made when it is asked for the first time, and again after
the weights have changed. It is kept beside the model, not in it: a model that is copied, pickled, saved or moved does
not take its prepared copies along, and they go when it goes.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mvision.fast.packed import PackedConv2d, PackedLinear
from mvision.fast.prepare import prepare
from mvision.inference.predict import Predictor
from mvision.machine import Precision

M = TypeVar("M", bound=nn.Module)
Choice = tuple[torch.device, Precision]
_log = logging.getLogger("mvision")


def prepared_copy(model: M, device: torch.device, precision: Precision) -> M:
    """A copy of the model that is prepared for prediction on a device, with the weights that the model has now.

    Any number of threads may ask. It is noticed when weights, buffers or the config are changed or replaced, in
    whatever way, and when layers are; not when other attributes of layers are set.
    """
    device = torch.empty(0, device=device).device  # with its number: "cuda" is "cuda:0"
    with _of_all.lock:
        copies = _of_all.by_model.get(model)
        if copies is None:
            copies = _of_all.by_model[model] = Copies()
    return cast(M, copies.get(model, (device, precision)))


class Copies:
    """The prepared copies of one model, by device and precision."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._by_choice: dict[Choice, nn.Module] = {}
        self._told: set[Choice] = set()
        self._config: Any = None
        self._state: tuple[Any, ...] = ()
        self._first_numbers: list[Tensor] = []  # views of the model's own weights
        self._copied_numbers = torch.empty(0)  # what they were

    def get(self, model: nn.Module, choice: Choice) -> nn.Module:
        """The copy; it is made if there is none of the current weights."""
        with self.lock:
            if not self._is_current(model):
                self._by_choice.clear()
                self._remember(model)
            if choice not in self._by_choice:
                self._by_choice[choice] = _make(model, choice)
                if choice not in self._told:
                    self._told.add(choice)
                    say(_description(self._by_choice[choice], choice))
            return self._by_choice[choice]

    def _is_current(self, model: nn.Module) -> bool:
        return (
            self._state == _state(model)
            and self._config == cast(Predictor, model).config
            # Counters of changes miss optimisers with one kernel for all weights (``fused=True``), changes through
            # ``.data``, and the statistics of norms. All of these change whole tensors, so one number of each tells.
            and torch.equal(_numbers(self._first_numbers), self._copied_numbers)
        )

    def _remember(self, model: nn.Module) -> None:
        self._state = _state(model)
        self._config = copy.deepcopy(cast(Predictor, model).config)
        with torch.inference_mode(False), torch.no_grad():
            self._first_numbers = [
                tensor.detach().as_strided((1,), (1,), tensor.storage_offset())
                for tensor in _tensors(model)
                if tensor.is_floating_point() and tensor.numel()
            ]
            self._copied_numbers = _numbers(self._first_numbers)


class _OfAllModels:
    """The prepared copies of every model that exists."""

    def __init__(self) -> None:
        self.by_model: WeakKeyDictionary[nn.Module, Copies] = WeakKeyDictionary()
        self.lock = threading.Lock()

    def after_fork(self) -> None:
        """In the new process: threads that may have held a lock do not exist in it."""
        self.lock = threading.Lock()
        for copies in self.by_model.values():
            copies.lock = threading.Lock()


_of_all = _OfAllModels()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_of_all.after_fork)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; several times faster than ``model.parameters()``, which matters in every prediction."""
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            yield from (tensor for tensor in module._parameters.values() if tensor is not None)
            yield from (tensor for tensor in module._buffers.values() if tensor is not None)
            modules.extend(module._modules.values())


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What changes when a tensor is replaced, moved or changed in place."""
    tensors = list(_tensors(model))
    places = tuple((id(tensor), tensor.data_ptr()) for tensor in tensors)
    if any(tensor.is_inference() for tensor in tensors):
        return places  # a tensor that was made in torch.inference_mode has no counter
    return (*places, *(tensor._version for tensor in tensors))


def _numbers(views: list[Tensor]) -> Tensor:
    return torch.cat(views) if views else torch.empty(0)


def _make(model: nn.Module, choice: Choice) -> nn.Module:
    device, precision = choice
    seeded = [device] if device.type == "cuda" else []
    # New layers draw random weights before they get theirs; the caller's random numbers stay as they were.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(seeded):
        made = copy.deepcopy(model).eval().to(device)
        return prepare(made, precision)


def _description(made: nn.Module, choice: Choice) -> str:
    device, precision = choice
    height, width = cast(Predictor, made).config.image_size
    # Not among the parameters.
    packed = [part.weight for part in made.modules() if isinstance(part, PackedConv2d | PackedLinear)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*_tensors(made), *packed))
    place = f"PyTorch on {device.type} in {precision}, image size {height}x{width}"
    return f"Model.predict: {place}, by a prepared copy of the weights ({size / 1e6:.0f} MB)"


def say(line: str) -> None:
    """A line for the user, by the logger ``mvision``: on stderr, unless the program has set up its logging.

    ``logging.getLogger("mvision").setLevel("WARNING")`` silences it.
    """
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler())
        if _log.level == logging.NOTSET:
            _log.setLevel(logging.INFO)
    _log.info(line)
