"""Training on a GPU with CUDA graphs of the backbone and the neck.

Starting a kernel takes the CPU longer than most kernels of a training step run, and the backbone and the neck start
about half of them. A CUDA graph is a recording of kernels with all addresses in memory, which one call starts again:
one graph for the forward pass and one for the backward pass, for every size of images. Heads are not recorded: the
number of their denoising queries differs from batch to batch.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mvision.compat import end_failed_capture
from mvision.model import Features, Model
from mvision.neck.cached import cached_tensors

SIZES = 16
"""Shapes of batches that get a graph. All share the memory of the activations, which is that of the largest one; each
has gradients of its own."""
WARMUPS = 2  # passes before a recording, in which libraries choose their algorithms
Key = tuple[Any, ...]


def can_record(accelerator: Accelerator, accumulate: int) -> bool:
    """Whether a training may use graphs, see ``record_features``; ``accumulate`` batches make an optimiser step."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and accumulate == 1


def record_features(model: Model) -> None:
    """Let ``model.features`` replay CUDA graphs in training, in place; a shape is recorded when it comes again.

    The gradients that the graphs write belong to them and are overwritten by the next backward pass, so they must not
    be accumulated over several batches, nor be averaged over several processes while they are computed.
    """
    model.features = RecordedFeatures(model)  # type: ignore[method-assign]


class RecordedFeatures:
    """``Model.features`` by CUDA graphs in training, and without them in evaluation.

    Where a recording fails (too little memory, a network that waits for the GPU), a warning says so, and the run goes
    on without graphs. A copy of the model has none.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._recorded: dict[Key, _Recording] = {}
        self._seen: set[Key] = set()
        self._works = True
        self._pool: Any = None  # of memory, for all of them

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(Model.features, memo[id(self._model)])

    def __call__(self, images: Tensor) -> Features:
        """See ``Model.features``."""
        if not (self._works and images.is_cuda and self._model.training and torch.is_grad_enabled()):
            return Model.features(self._model, images)
        key = (tuple(images.shape), images.dtype, images.stride(), *_autocast())
        recording = self._recorded.get(key) or self._record(key, images)
        if recording is None:
            return Model.features(self._model, images)
        maps = recording(images)
        count = len(maps) - len(recording.laterals)
        return Features(list(maps[:count]), dict(zip(recording.laterals, maps[count:])))

    def _record(self, key: Key, images: Tensor) -> _Recording | None:
        """A new recording, unless the shape comes for the first time or there are enough of them."""
        if key not in self._seen or len(self._recorded) >= SIZES:
            self._seen.add(key)
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            self._recorded[key] = _Recording(self._model, images, self._pool)
        except RuntimeError as error:
            self._works = False
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"trains without CUDA graphs, which is slower: {reason}", stacklevel=2)
            end_failed_capture(images.device, self._pool)
            return None
        return self._recorded[key]


class _Recording:
    """The forward and the backward pass of backbone and neck for batches of one shape.

    Raises:
        RuntimeError: they cannot be recorded.
    """

    def __init__(self, model: Model, images: Tensor, pool: Any) -> None:
        self.parameters = [p for part in (model.backbone, model.neck) for p in part.parameters() if p.requires_grad]
        self.images = images.clone(memory_format=torch.preserve_format)
        buffers = [buffer for part in (model.backbone, model.neck) for buffer in part.buffers()]
        before = [buffer.clone() for buffer in buffers]
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        enabled, dtype = _autocast()
        # Without autocast's cache: a weight that was converted before the recording would never be converted again.
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self._backward(self._forward(model))
            stream.synchronize()
            self._capture(model, pool, stream)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        for buffer, value in zip(buffers, before):  # the passes above have moved the running means of norms
            buffer.copy_(value)
        self.held = cached_tensors(model)  # read by the graphs besides the weights

    def _capture(self, model: Model, pool: Any, stream: torch.cuda.Stream) -> None:
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, may allocate memory meanwhile.
        settings: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward_graph, pool=pool, **settings):
            outputs = self._forward(model)
        self.output_gradients = [torch.empty_like(output) for output in outputs]
        with torch.cuda.graph(self.backward_graph, pool=pool, **settings):
            self.gradients = self._backward(outputs, self.output_gradients)
        self.outputs = [output.detach() for output in outputs]

    def _forward(self, model: Model) -> list[Tensor]:
        features = Model.features(model, self.images)
        self.laterals = list(features.laterals)
        return [*features.maps, *features.laterals.values()]

    def _backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor | None]:
        """The gradients of all parameters, None for those that no output depends on."""
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients or map(torch.ones_like, outputs))
            if output.requires_grad
        ]
        if not pairs or not self.parameters:
            return [None] * len(self.parameters)
        found, given = zip(*pairs)
        return list(torch.autograd.grad(found, self.parameters, given, allow_unused=True))

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of neck and backbone for other images of the same shape; valid until the next call."""
        return _Replay.apply(self, images, *self.parameters)


class _Replay(torch.autograd.Function):
    """Replay a recording; autograd sees one operator from the parameters to the maps."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, images: Tensor, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        recording.images.copy_(images, non_blocking=True)
        recording.forward_graph.replay()
        ctx.recording = recording
        return tuple(output.detach() for output in recording.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        for place, gradient in zip(recording.output_gradients, gradients):
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient)
        recording.backward_graph.replay()
        return None, None, *(None if value is None else value.detach() for value in recording.gradients)


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
