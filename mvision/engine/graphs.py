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
            warnings.warn(f"trains without CUDA graphs, which is slower: {_cause(error)}", stacklevel=2)
            end_failed_capture(images.device, self._pool)
            return None
        return self._recorded[key]


class _Passes:
    """The forward and the backward pass of backbone and neck for one batch of images.

    Attributes:
        parameters: those that are trained.
        laterals: strides of the backbone's maps for the heads, after a forward pass.
    """

    def __init__(self, model: Model, images: Tensor) -> None:
        self.images = images
        self._parts = _Parts(model)
        named = {name: value for name, value in self._parts.named_parameters() if value.requires_grad}
        self.parameters = list(named.values())
        # Autograd keeps one node for each parameter, with the stream in which it was made, as long as anything of an
        # earlier step is alive; waiting for that stream ends a capture. Other tensors with the same memory have nodes
        # of their own.
        self._same = {name: value.detach().requires_grad_() for name, value in named.items()}
        self.laterals: list[int] = []

    def forward(self) -> list[Tensor]:
        """The neck's maps, then those of the backbone for the heads."""
        features: Features = torch.func.functional_call(self._parts, self._same, (self.images,))
        self.laterals = list(features.laterals)
        return [*features.maps, *features.laterals.values()]

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of ``parameters``; None for those that no output depends on."""
        pairs = [(output, gradient) for output, gradient in zip(outputs, gradients) if output.requires_grad]
        if not pairs:
            return [None] * len(self.parameters)
        found, given = zip(*pairs)
        return list(torch.autograd.grad(found, list(self._same.values()), given, allow_unused=True))


class _Parts(nn.Module):
    """What ``Model.features`` uses of a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck

    def forward(self, images: Tensor) -> Features:
        return Model.features(self, images)  # type: ignore[arg-type]


class _Recording:
    """The passes of batches of one shape as CUDA graphs.

    Raises:
        RuntimeError: they cannot be recorded.
    """

    def __init__(self, model: Model, images: Tensor, pool: Any) -> None:
        self.images = images.clone(memory_format=torch.preserve_format)
        passes = _Passes(model, self.images)
        buffers = [buffer for part in (model.backbone, model.neck) for buffer in part.buffers()]
        before = [buffer.clone() for buffer in buffers]
        current, stream = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        stream.wait_stream(current)
        enabled, dtype = _autocast()
        # Without autocast's cache: a weight that was converted before the recording would never be converted again.
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    outputs = passes.forward()
                    passes.backward(outputs, [torch.ones_like(output) for output in outputs])
                del outputs
            stream.synchronize()
            self._capture(passes, pool, stream)
        current.wait_stream(stream)
        for buffer, value in zip(buffers, before):  # the passes above have moved the running means of norms
            buffer.copy_(value)
        self.parameters, self.laterals = passes.parameters, passes.laterals
        self.held = cached_tensors(model)  # read by the graphs besides the weights

    def _capture(self, passes: _Passes, pool: Any, stream: torch.cuda.Stream) -> None:
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, may allocate memory meanwhile.
        settings: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward_graph, **settings):
            outputs = passes.forward()
        self.output_gradients = [torch.empty_like(output) for output in outputs]
        with torch.cuda.graph(self.backward_graph, **settings):
            self.gradients = passes.backward(outputs, self.output_gradients)
        self.outputs = [output.detach() for output in outputs]

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


def _cause(error: BaseException) -> str:
    """The first line of the error that caused the others: after it, the end of the capture fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
