"""Feature networks of timm and segmentation-models-pytorch: how to build them, and which of their maps to read.

Everything that has to be known beforehand (channels, strides, accepted sizes, idle layers) is found out by building and
running the network on the meta device: without data, in a moment, and without touching the random state.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.storage.hub import cache_only_if_unreachable, download_problem

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMP = "smp:"


@dataclass(frozen=True)
class FeaturePlan:
    """How to build a feature network, and what to read from it.

    Attributes:
        build: a new network with random weights, or the library's (True), that returns a list of maps.
        keep: indices into that list.
        statistics: mean and std of its input in 0..1, given whether weights are the library's.
        multiple: side lengths of its input have to be multiples of this; 1 where any will do.
        fixed: its input size may be fixed when it is built.
    """

    build: Callable[..., nn.Module]
    keep: list[int]
    channels: list[int]
    strides: list[int]
    statistics: Callable[[bool], tuple[Sequence[float], Sequence[float]]]
    multiple: int = 1
    fixed: bool = False


@lru_cache(maxsize=64)
def plan_network(name: str, strides: tuple[int, ...], image_size: tuple[int, int]) -> FeaturePlan:
    """The plan for maps of these strides, finest first; for a plain ViT, which has one stride, for as many maps.

    Raises:
        UserError: the network gives no maps, or none of these strides.
    """
    return _smp_plan(name, strides) if name.startswith(SMP) else _timm_plan(name, strides, image_size)


def pyramid_of(name: str) -> list[int]:
    """The strides of the maps that a network offers, finest first; empty for a plain ViT, which has one stride only."""
    if name.startswith(SMP):
        return [stride for stride in _smp_strides(name)[0] if stride]
    _, _, reductions = _timm_facts(name)
    strides = sorted(set(reductions))
    return strides if len(strides) > 1 else []


def _timm_plan(name: str, strides: tuple[int, ...], image_size: tuple[int, int]) -> FeaturePlan:
    import timm

    arguments, channels, reductions = _timm_facts(name)
    if len(reductions) > 1 and len(set(reductions)) == 1:
        indices, multiple = _spread(len(reductions), len(strides)), reductions[0]
    else:
        indices, multiple = _by_stride(name, reductions, strides), 1
    options: dict[str, Any] = {}
    if "img_size" in arguments:
        options["img_size"] = tuple(-(-side // multiple) * multiple for side in image_size)
    if "dynamic_img_size" in arguments:
        options["dynamic_img_size"] = True
    if "strict_img_size" in arguments:
        options["strict_img_size"] = False

    def build(pretrained: bool = False) -> nn.Module:
        return timm.create_model(name, pretrained, features_only=True, out_indices=tuple(indices), **options)

    def statistics(pretrained: bool) -> tuple[Sequence[float], Sequence[float]]:
        facts = timm.get_pretrained_cfg(name)
        return (facts.mean, facts.std) if facts else (IMAGENET_MEAN, IMAGENET_STD)

    return FeaturePlan(
        build=build,
        keep=list(range(len(indices))),
        channels=[channels[index] for index in indices],
        strides=[reductions[index] for index in indices],
        statistics=statistics,
        multiple=multiple,
        fixed="img_size" in options,
    )


@cache
def _timm_facts(name: str) -> tuple[frozenset[str], list[int], list[int]]:
    """Size arguments of the network's class; channels and strides of all its maps. Nothing is allocated."""
    import timm

    arguments = inspect.signature(type(_without_data(lambda: timm.create_model(name))).__init__).parameters
    try:
        info = _without_data(lambda: timm.create_model(name, features_only=True)).feature_info.info
    except (AttributeError, RuntimeError) as error:
        raise UserError(f"backbone '{name}' gives no feature maps in timm: choose another one") from error
    return frozenset(arguments), [entry["num_chs"] for entry in info], [entry["reduction"] for entry in info]


def _spread(blocks: int, count: int) -> list[int]:
    """Blocks of a plain ViT to read: the last one, and others at equal steps before it (5, 8, 11 of 12 for three)."""
    step = max(1, blocks // (count + 1))
    return [max(0, blocks - 1 - step * index) for index in reversed(range(count))]


def _by_stride(name: str, available: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Index of the deepest map of every wanted stride."""
    missing = [stride for stride in wanted if stride not in available]
    if missing or not wanted or sorted(set(wanted)) != list(wanted):
        raise UserError(
            f"model.backbone.strides: backbone {name} has strides {', '.join(map(str, sorted(set(available))))}; "
            f"choose from them, in rising order (got {list(wanted)})"
        )
    return [len(available) - 1 - list(reversed(available)).index(stride) for stride in wanted]


def _smp_plan(name: str, strides: tuple[int, ...]) -> FeaturePlan:
    from segmentation_models_pytorch import encoders

    encoder_name = name.removeprefix(SMP)
    available, channels = _smp_strides(name)
    _by_stride(name, [stride for stride in available if stride], strides)
    keep = [available.index(stride) for stride in strides]
    weights = _smp_weights(encoder_name)

    def build(pretrained: bool = False) -> nn.Module:
        if pretrained and encoder_name.startswith("mit_b"):
            warnings.warn(f"the pretrained weights of {name} are for non-commercial use only", stacklevel=2)
        return encoders.get_encoder(encoder_name, depth=max(keep), weights=weights if pretrained else None)

    def statistics(pretrained: bool) -> tuple[Sequence[float], Sequence[float]]:
        if not pretrained:  # the numbers come with the weights, from the network
            return IMAGENET_MEAN, IMAGENET_STD
        with cache_only_if_unreachable():
            facts = encoders.get_preprocessing_params(encoder_name, pretrained=weights)
        return facts["mean"], facts["std"]

    return FeaturePlan(build, keep, [channels[level] for level in keep], list(strides), statistics)


@cache
def _smp_strides(name: str) -> tuple[list[int], list[int]]:
    """Stride (0 for levels without a map) and channels of every level of an encoder. Nothing is allocated."""
    from segmentation_models_pytorch import encoders

    channels = _without_data(lambda: encoders.get_encoder(name.removeprefix(SMP), weights=None)).out_channels
    # Level i has stride 2**i; level 0 is the image itself, and some levels are empty.
    return [2**level if level and count else 0 for level, count in enumerate(channels)], list(channels)


def _smp_weights(encoder_name: str) -> str:
    """The weights trained on ImageNet alone where there are such, else the first named."""
    from segmentation_models_pytorch import encoders

    choices = list(encoders.encoders[encoder_name]["pretrained_settings"])
    return "imagenet" if "imagenet" in choices else choices[0]


@cache
def smp_names() -> list[str]:
    """Names of segmentation-models-pytorch's own encoders, without ``smp:``."""
    from segmentation_models_pytorch import encoders

    return sorted(encoders.get_encoder_names())


@lru_cache(maxsize=64)
def probe(name: str, strides: tuple[int, ...], image_size: tuple[int, int]) -> tuple[list[str], bool]:
    """Run the network once: the parameters that no map depends on, and whether other image sizes work too.

    Raises:
        UserError: it cannot take images of this (height, width).
    """
    plan = plan_network(name, strides, image_size)
    height, width = (-(-side // plan.multiple) * plan.multiple for side in image_size)
    net = _without_data(plan.build).eval()
    maps, reason = _try(net, height, width)
    if reason:
        raise UserError(
            f"backbone {name} cannot take images of {height}x{width}; choose another size or backbone ({reason})"
        )
    any_size = not plan.fixed or not _try(net, height + 2 * plan.strides[-1], width + 4 * plan.strides[-1])[1]
    if not maps:
        return [], any_size
    torch.stack([maps[index].sum() for index in plan.keep]).sum().backward()
    return [key for key, value in net.named_parameters() if value.requires_grad and value.grad is None], any_size


def _without_data(build: Callable[[], nn.Module]) -> Any:
    """A network whose weights have shapes only: at once, whatever its size, and without touching the random state."""
    try:
        with torch.device("meta"), torch.inference_mode(False):
            return build()
    except RuntimeError as error:  # some constructors compute with tensors
        if "meta tensor" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        return build().to("meta")


def _try(net: nn.Module, height: int, width: int) -> tuple[list[Tensor], str]:
    """The maps for an image of this size, or the reason why there are none. Both empty: it cannot be told."""
    try:
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            return net(torch.empty(1, 3, height, width)), ""
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return [], ""
        return [], str(error).splitlines()[0] if str(error) else "the network does not say why"


def build_pretrained(plan: FeaturePlan, name: str) -> nn.Module:
    """The network with its library's weights, from the cache or the network; UserError where there are none."""
    try:
        with cache_only_if_unreachable():
            return plan.build(pretrained=True)
    # Network, disk and library fail in many ways; the network itself has been built before, so it is about its weights.
    except Exception as error:
        raise UserError(
            f"pretrained weights of backbone {name} cannot be loaded ({download_problem(error)}): connect to the network "
            f"once, or set model.backbone.pretrained=false, or start from weights with --init"
        ) from error
