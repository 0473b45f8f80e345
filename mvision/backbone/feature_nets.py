"""Feature networks of timm, EdgeCrafter and segmentation-models-pytorch: how to build them, which maps to take.

Channels, strides, accepted image sizes and unused layers are determined by building and running the network on the meta
device, which has shapes but no data: that is fast and leaves the random state alone.
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

from mvision.backbone import ecvit_names
from mvision.errors import UserError
from mvision.storage.hub import cache_only_if_unreachable, download_problem

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMP = "smp:"


@dataclass(frozen=True)
class FeaturePlan:
    """How to build a feature network, and which of its maps to take.

    Attributes:
        build: returns a new network, with the library's weights if its argument is True, else with random ones. The
            network returns a list of maps.
        keep: indices into that list, finest map first.
        channels, strides: of the kept maps.
        statistics: mean and std of the input (in 0..1) by channel; the argument is that of ``build``.
        multiple: the sides of the input have to be multiples of this; 1 for any size.
        fixed: the network is built for an image size and may accept no other.
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
    """The plan for maps of these strides, finest first. A plain ViT has one stride; it is planned for as many maps.

    No strides at all stand for the maps of a plain ViT's last two blocks.

    Raises:
        UserError: the network returns no feature maps, or none of a given stride.
    """
    if name in ecvit_names.SIZES:
        return _ecvit_plan(name)
    return _smp_plan(name, strides) if name.startswith(SMP) else _timm_plan(name, strides, image_size)


def pyramid_of(name: str) -> list[int]:
    """The strides of all maps of a network, finest first; empty for a plain ViT, whose maps have one stride."""
    if name in ecvit_names.SIZES:
        return []
    if name.startswith(SMP):
        return [stride for stride in _smp_strides(name)[0] if stride]
    _, _, reductions = _timm_facts(name)
    strides = sorted(set(reductions))
    return strides if len(strides) > 1 else []


def _ecvit_plan(name: str) -> FeaturePlan:
    size = ecvit_names.SIZES[name]

    def build(pretrained: bool = False) -> nn.Module:
        from mvision.backbone.ecvit import EcViT

        assert not pretrained, "refused by build_pretrained"
        return EcViT(size)

    return FeaturePlan(
        build=build,
        keep=list(range(ecvit_names.TAKEN)),
        channels=[size.dim] * ecvit_names.TAKEN,
        strides=[ecvit_names.PATCH] * ecvit_names.TAKEN,
        statistics=lambda _: (IMAGENET_MEAN, IMAGENET_STD),
        multiple=ecvit_names.PATCH,
    )


def _timm_plan(name: str, strides: tuple[int, ...], image_size: tuple[int, int]) -> FeaturePlan:
    import timm

    arguments, channels, reductions = _timm_facts(name)
    if len(reductions) > 1 and len(set(reductions)) == 1:
        indices, multiple = _spread(len(reductions), len(strides)), reductions[0]
    else:
        indices, multiple = _by_stride(name, reductions, strides), 1
    size = tuple(-(-side // multiple) * multiple for side in image_size)
    any_options: dict[str, Any] = {"img_size": size, "dynamic_img_size": True, "strict_img_size": False}
    options = {key: value for key, value in any_options.items() if key in arguments}

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
    """Names of the constructor's arguments; channels and strides of all maps, without allocating the weights."""
    import timm

    arguments = inspect.signature(type(_without_data(lambda: timm.create_model(name))).__init__).parameters
    try:
        info = _without_data(lambda: timm.create_model(name, features_only=True)).feature_info.info
    except (AttributeError, RuntimeError) as error:
        raise UserError(f"backbone '{name}' returns no feature maps in timm: choose another one") from error
    return frozenset(arguments), [entry["num_chs"] for entry in info], [entry["reduction"] for entry in info]


def whole_network(name: str) -> nn.Module:
    """A network of timm with all its layers, those behind the last map too, without data."""
    import timm

    return _without_data(lambda: timm.create_model(name))


def _spread(blocks: int, count: int) -> list[int]:
    """Blocks of a plain ViT to take maps from: the last one and others at equal steps (5, 8, 11 of 12 for three).

    A count of 0 stands for the last two.
    """
    if not count:
        return list(range(max(0, blocks - ecvit_names.TAKEN), blocks))
    step = max(1, blocks // (count + 1))
    return [max(0, blocks - 1 - step * index) for index in reversed(range(count))]


def _by_stride(name: str, available: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Index of the last map of every wanted stride."""
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
    # The weights trained on ImageNet where there are such, else the first in the library's list.
    choices = list(encoders.encoders[encoder_name]["pretrained_settings"])
    weights = "imagenet" if "imagenet" in choices else choices[0]

    def build(pretrained: bool = False) -> nn.Module:
        if pretrained and encoder_name.startswith("mit_b"):
            warnings.warn(f"the pretrained weights of {name} are for non-commercial use only", stacklevel=2)
        return encoders.get_encoder(encoder_name, depth=max(keep), weights=weights if pretrained else None)

    def statistics(pretrained: bool) -> tuple[Sequence[float], Sequence[float]]:
        if not pretrained:  # the library would download them together with the weights
            return IMAGENET_MEAN, IMAGENET_STD
        with cache_only_if_unreachable():
            facts = encoders.get_preprocessing_params(encoder_name, pretrained=weights)
        return facts["mean"], facts["std"]

    return FeaturePlan(build, keep, [channels[level] for level in keep], list(strides), statistics)


@cache
def _smp_strides(name: str) -> tuple[list[int], list[int]]:
    """Stride (0 for levels without a map) and channels of every level of an encoder, without allocating its weights."""
    from segmentation_models_pytorch import encoders

    channels = _without_data(lambda: encoders.get_encoder(name.removeprefix(SMP), weights=None)).out_channels
    # Level i has stride 2**i; level 0 is the image itself, and some levels are empty.
    return [2**level if level and count else 0 for level, count in enumerate(channels)], list(channels)


@cache
def smp_names() -> list[str]:
    """Names of segmentation-models-pytorch's own encoders, without ``smp:``."""
    from segmentation_models_pytorch import encoders

    return sorted(encoders.get_encoder_names())


@lru_cache(maxsize=64)
def probe(name: str, strides: tuple[int, ...], image_size: tuple[int, int]) -> tuple[list[str], bool]:
    """Run the network once on the meta device.

    Returns:
        The names of the parameters that no kept map depends on, and whether other image sizes are accepted too.

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
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
        torch.stack([maps[index].sum() for index in plan.keep]).sum().backward()
    return [key for key, value in net.named_parameters() if value.requires_grad and value.grad is None], any_size


def _without_data(build: Callable[[], nn.Module]) -> Any:
    """A network on the meta device: its weights have shapes but no data, and the random state is left alone."""
    try:
        with torch.device("meta"), torch.inference_mode(False):
            return build()
    except RuntimeError as error:  # some constructors compute with their tensors
        if "meta tensor" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        return build().to("meta")


def _try(net: nn.Module, height: int, width: int) -> tuple[list[Tensor], str]:
    """The maps for an image of this size, or an error message; neither if the network cannot run without data."""
    try:
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            return net(torch.empty(1, 3, height, width)), ""
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return [], ""
        return [], str(error).splitlines()[0] if str(error) else type(error).__name__


def build_pretrained(plan: FeaturePlan, name: str) -> nn.Module:
    """The network with its library's weights, from the cache or the network; UserError where there are none."""
    if name in ecvit_names.SIZES:
        raise UserError(
            f"model.backbone.pretrained: no library has weights of {name}: give its authors' file as "
            "model.backbone.weights, or start from a whole model with --init"
        )
    try:
        with cache_only_if_unreachable():
            return plan.build(pretrained=True)
    # Downloads and files fail with many types of errors. The architecture has been built before, so it is the weights.
    except Exception as error:
        raise UserError(
            f"pretrained weights of backbone {name} cannot be loaded ({download_problem(error)}): connect to the "
            f"network once, or set model.backbone.pretrained=false, or start from weights with --init"
        ) from error
