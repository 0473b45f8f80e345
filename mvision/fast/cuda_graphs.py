"""Prediction on a GPU as a CUDA graph: all kernels of a forward pass start with one call.

A forward pass consists of hundreds of kernels, and starting one takes the CPU longer than most of them run. A CUDA
graph is a recording of them for inputs of one shape, with all addresses in memory; a replay computes the same again.

A shape is captured when it is seen for the second time: the first batches of a folder or a video have the same size,
while the last batch of a folder, which is smaller, comes once, and capturing it would take longer than it saves.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvision.compat import end_failed_capture
from mvision.neck.cached import cached_tensors, in_graph

GRAPHS = 8
"""Shapes of one model that are kept as graphs. They share their memory, which is that of the largest one."""

Key = tuple[tuple[int, ...], torch.dtype]
Forward = Callable[[Tensor], Any]


class Captured:
    """A forward pass captured for inputs of one shape; ``held`` are tensors that it reads besides the weights.

    Raises:
        RuntimeError: it cannot be captured: out of memory, or it waits for results of the GPU on the way.
    """

    def __init__(self, model: nn.Module, forward: Forward, images: Tensor, pool: Any) -> None:
        with torch.inference_mode(False):  # a tensor of that mode could not be written outside of it
            self.images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        before = torch.cuda.current_stream(images.device)
        # cuDNN and cuBLAS keep what they chose for a shape, and their work space, by thread and stream. All captures
        # run in one thread that never ends, so that nothing that a graph uses is freed, and no other thread's choice,
        # made without measuring, is taken over.
        _capture_thread().submit(self._capture, forward, before, pool).result()
        self.held = cached_tensors(model)

    def _capture(self, forward: Forward, before: torch.cuda.Stream, pool: Any) -> None:
        device = self.images.device
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), _fastest_algorithms():
            stream = torch.cuda.Stream(device)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries prepare themselves in the first calls
                    forward(self.images)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads, such as that of the post-processing, may allocate memory and wait meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = forward(self.images)
            stream.synchronize()

    def __call__(self, images: Tensor) -> Any:
        """The outputs for other images of the same shape, in tensors of the caller's own."""
        self.images.copy_(images)
        self.images.record_stream(torch.cuda.current_stream(images.device))
        self.graph.replay()
        return copy_of(self.outputs)


class Replays:
    """The graphs of one model, and which shapes are worth one. A copy, or a pickle, has none.

    Args:
        compiles: the forward pass is compiled by ``torch.compile`` first.
    """

    def __init__(self, compiles: bool = False) -> None:
        self.compiles = compiles
        self.works = True  # until a capture fails for another reason than memory
        self.compiled: Forward | None = None
        self.compiled_for: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Key, Captured] = OrderedDict()  # the one that was not used longest comes first
        self._seen: OrderedDict[Key, int] = OrderedDict()  # calls without a graph
        self._wanted: dict[Key, int] = {}  # calls before a shape gets a graph, where it is not two
        self._pool: Any = None  # of the memory that all graphs share
        self._done: torch.cuda.Event | None = None  # the last replay

    def __reduce__(self) -> tuple[type[Replays], tuple[bool]]:
        return Replays, (self.compiles,)

    def __len__(self) -> int:
        return len(self._graphs)

    def drop(self) -> None:
        """Forget all graphs: the weights are elsewhere now."""
        with self._lock:
            while self._graphs:
                self._drop(next(iter(self._graphs)))
            self.compiled = None
            self.compiled_for.clear()

    def run(self, model: nn.Module, forward: Forward, images: Tensor) -> Any:
        """The outputs of ``forward(images)``, which runs ``model``, by a graph where there is one."""
        key = tuple(images.shape), images.dtype
        # Graphs share memory, and each has one place for its input: one replay at a time, on the CPU and on the GPU.
        with self._lock:
            graph = self._graphs.get(key) or self._new(key, model, forward, images)
            if graph is not None:
                self._graphs.move_to_end(key)
                return self._replay(graph, images)
        with torch.no_grad():
            return forward(images)

    def _replay(self, graph: Captured, images: Tensor) -> Any:
        if images.is_cuda:
            stream = torch.cuda.current_stream(images.device)
            if self._done is not None:
                stream.wait_event(self._done)
            outputs = graph(images)
            self._done = self._done or torch.cuda.Event()
            self._done.record(stream)
            return outputs
        return graph(images)

    def _new(self, key: Key, model: nn.Module, forward: Forward, images: Tensor) -> Captured | None:
        """A graph for this shape, if it has been seen often enough and can be captured."""
        seen = self._seen.pop(key, 0) + 1
        self._seen[key] = seen
        while len(self._seen) > 8 * GRAPHS:
            self._wanted.pop(self._seen.popitem(last=False)[0], None)
        if not self.works or seen < self._wanted.get(key, 2):
            return None
        while len(self._graphs) >= GRAPHS:
            oldest = next(iter(self._graphs))
            self._drop(oldest)
            # More shapes in turn than there are graphs: each is captured more and more rarely.
            self._wanted[oldest] = 2 * self._wanted.get(oldest, 2)
        try:
            if not self._graphs:  # memory that no graph uses any more is given back
                self._pool = new_pool(images.device)
            self._graphs[key] = Captured(model, forward, images, self._pool)
        except RuntimeError as error:
            if images.is_cuda:
                end_failed_capture(images.device, self._pool)
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                self._wanted[key] = 1 << 62
                _tell(f"images of {key[0]} are predicted without a CUDA graph: too little GPU memory for one")
            else:
                self.works = False
                reason = str(first).strip().partition("\n")[0]
                _tell(f"the model cannot be captured in a CUDA graph and is slower without ({reason})")
            return None
        del self._seen[key]
        return self._graphs[key]

    def _drop(self, key: Key) -> None:
        if self._done is not None:  # the GPU may still read the graph's memory
            self._done.synchronize()
        del self._graphs[key]
        self._seen.pop(key, None)


class _Graphed(nn.Module):
    """Comes before a model's own class and replays graphs instead of its ``forward``; see ``replay_graphs``."""

    _replays: Replays

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        """As the model's own, with graphs for predictions on a GPU."""
        if targets is not None or in_graph() or self.training:
            return super().forward(images, targets)  # type: ignore[misc]
        forward = self._by_compiler if self._replays.compiles else self._plain
        return self._replays.run(self, forward, images) if can_replay(self, images) else forward(images)

    def _plain(self, images: Tensor) -> Any:
        return super().forward(images)  # type: ignore[misc]

    def _by_compiler(self, images: Tensor) -> Any:
        replays, shape, start = self._replays, tuple(images.shape), time.perf_counter()
        if replays.compiled is None:
            replays.compiled = torch.compile(self._plain, dynamic=False)
        with torch.no_grad():
            outputs = replays.compiled(images)
        if shape not in replays.compiled_for:
            replays.compiled_for.add(shape)
            _tell(f"torch.compile took {time.perf_counter() - start:.0f} s for images of {shape}")
        return outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Graphed:
        """Weights on another device or of another type: a graph would go on reading the old ones."""
        self._replays.drop()
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """With ``assign`` the weights are in other places afterwards; without it graphs read the new values."""
        if assign:
            self._replays.drop()
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).__mro__[2],), self.__dict__.copy()


def replay_graphs(model: nn.Module, compiles: bool = False) -> None:
    """Let predictions of a model on a GPU replay CUDA graphs, in place.

    Weights that are changed in place take effect at once. Weights that are moved by methods of the model drop its
    graphs. Several threads may predict at once.

    Args:
        compiles: let ``torch.compile`` compile the forward pass, on any device, when a shape is seen for the first
            time; that takes about a minute.
    """
    if not isinstance(model, _Graphed):
        model.__class__ = _graphed_class(type(model))  # type: ignore[arg-type]
    cast(_Graphed, model)._replays = Replays(compiles)


def can_replay(model: nn.Module, images: Tensor) -> bool:
    """Whether a prediction may be captured or replayed: on the model's GPU, and nobody else captures or traces it."""
    return (
        images.is_cuda
        and images.numel() > 0
        and images.device == next(model.parameters()).device
        and not torch.is_autocast_enabled("cuda")
        and not (images.requires_grad and torch.is_grad_enabled())
        and not torch.cuda.is_current_stream_capturing()
    )


def copy_of(outputs: Any) -> Any:
    """The same nested dictionaries, lists and tuples with copies of the tensors; a repeated one is copied once."""
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copies.setdefault(id(value), value.clone()) if id(value) not in copies else copies[id(value)]
        if isinstance(value, Mapping):
            return {key: copied(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [copied(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    return copied(outputs)


def new_pool(device: torch.device) -> Any:
    """A new pool of memory for graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


@cache
def _graphed_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_Graphed, base), {"__doc__": base.__doc__, "__module__": base.__module__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    graphed = _graphed_class(base)  # type: ignore[arg-type]
    return graphed.__new__(graphed)


@cache
def _capture_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="mvision-capture")


@contextmanager
def _fastest_algorithms() -> Iterator[None]:
    """cuDNN measures its algorithms and takes the fastest, where the results need not be the same in every run."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or not (
        torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    )
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _first(error: BaseException) -> BaseException:
    """The error that caused the others: after it the end of the capture fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _tell(line: str) -> None:
    warnings.warn(line, stacklevel=2)
