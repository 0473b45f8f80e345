"""Backbones: one interface for feature networks of timm, EdgeCrafter and segmentation-models-pytorch.

It covers what the libraries leave to their users: normalisation of the input, the memory layout of the maps, image
sides that are not a multiple of the patch size, and layers whose outputs are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.backbone.affine import fold_affine
from mvision.backbone.ecvit_names import SIZES
from mvision.backbone.feature_nets import SMP, FeaturePlan, build_pretrained, plan_network, probe, pyramid_of, smp_names
from mvision.backbone.folding import fold_norms, observe
from mvision.backbone.layer_order import layers_from_end, without_decay
from mvision.backbone.own_weights import load_file
from mvision.backbone.pyramid import Detail, MeanPyramid, detail_strides, pyramid_scales, resized
from mvision.errors import UserError, did_you_mean
from mvision.neck.layers import fuse_modules

if TYPE_CHECKING:
    from mvision.backbone.config import BackboneConfig


class Backbone(nn.Module):
    """A feature network by its name, see ``BackboneConfig``, and the pyramid of a plain ViT.

    Args:
        config: the network, strides, pyramid and normalisation.
        image_size: (height, width) of the input, for networks that are built for a fixed size.
        laterals: strides of the maps that heads take besides those of ``config.strides``. Strides that the network does
            not have, or that are not finer than all of ``config.strides``, are left out.

    Attributes:
        channels, strides: of the maps for the neck, finest first. All maps of a plain ViT have the same stride, unless
            they are made into a pyramid here.
        laterals: stride -> channels of the maps for heads, finest first.
        any_size: images of other sizes than ``image_size`` are accepted too.
        mean, std: (3, 1, 1), subtracted from and divided by images in 0..1, and saved with the weights; None: images
            are not normalised.
        fused: whether ``fuse`` was called.

    Raises:
        UserError: an unknown network, strides that it does not have, a size that it cannot take, or pretrained weights
            that are neither in the cache nor can be downloaded; a file of weights that does not fit.
    """

    fused = False
    mean: Tensor | None
    std: Tensor | None
    _mean_pixel: Tensor | None

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int], laterals: Iterable[int] = ()) -> None:
        super().__init__()
        check_backbone_name(config.name)
        self.config, self.image_size = config, image_size
        available = self._available(config)
        finer = sorted({stride for stride in laterals if stride < min(config.strides) and stride in available})
        resizes = config.pyramid == "mean-bilinear"
        strides = () if resizes else (*finer, *config.strides)
        plan = plan_network(config.name, strides, image_size)
        unused, self.any_size = probe(config.name, strides, image_size)
        self._keep, self._multiple = plan.keep, plan.multiple
        pretrained = config.pretrained and config.weights is None
        self.net = build_pretrained(plan, config.name) if pretrained else plan.build()
        if config.weights is not None:
            load_file(self.net, config.weights, config.name)
        self.pyramid: MeanPyramid | None = None
        self.detail: Detail | None = None
        if resizes:
            self._add_pyramid(plan, finer)
        else:
            self.laterals = dict(zip(plan.strides, plan.channels[: len(finer)]))
            self.channels, self.strides = plan.channels[len(finer) :], plan.strides[len(finer) :]
        # Distributed training needs a gradient for every trainable parameter.
        for name in unused:
            self.net.get_parameter(name).requires_grad_(False)
        self._takes_pixels = False  # the network's input is in 0..255, see _fold_scale
        self._channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        if config.stage1_shortcut:
            _add_stage1_shortcut(self.net, config.name)
        if config.freeze_norms is True and not _batch_norms(self.net):
            raise UserError(
                f"model.backbone.freeze_norms: {config.name} has no batch norms, so there is nothing to freeze: set it "
                "to false"
            )
        mean, std = plan.statistics(pretrained) if config.normalize == "auto" else (None, None)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if values is None else torch.tensor(values).view(3, 1, 1))

    @staticmethod
    def _available(config: BackboneConfig) -> list[int]:
        """Strides of which there are maps; raises UserError for settings that do not fit the network."""
        own = pyramid_of(config.name)
        if config.pyramid == "mean-bilinear":
            if own:
                raise UserError(
                    f"model.backbone.pyramid: mean-bilinear is for plain ViTs, whose maps have one stride; "
                    f"{config.name} has strides {', '.join(map(str, own))}: leave it at last"
                )
            return [4] if config.detail else []
        if config.detail:
            raise UserError(
                f"model.backbone.detail: {config.detail} is added to a pyramid of a plain ViT alone: set "
                "model.backbone.pyramid=mean-bilinear, or detail to 0"
            )
        return own

    def _add_pyramid(self, plan: FeaturePlan, finer: list[int]) -> None:
        scales = pyramid_scales(plan.strides[0], self.config.strides)
        self.pyramid = MeanPyramid(scales)
        self.strides = [round(plan.strides[0] / scale) for scale in scales]
        self.channels, self.laterals = [plan.channels[0]] * len(scales), {}
        if self.config.detail:
            self.detail = Detail(self.config.detail, [*finer, *detail_strides(self.config.strides)])
            widths = self.detail.channels
            self.laterals = dict(zip(finer, widths))
            self.channels = [own + more for own, more in zip(self.channels, widths[len(finer) :])]

    def decide_norms(self, own_weights: bool) -> None:
        """Replace ``freeze_norms: auto`` in the config of a new run that starts from the backbone's weights, or not."""
        if self.config.freeze_norms == "auto":
            self.config.freeze_norms = own_weights and bool(_batch_norms(self.net))

    def train(self, mode: bool = True) -> Backbone:
        """As in torch; with ``freeze_norms`` the network's batch norms stay in eval mode."""
        super().train(mode)
        if self.config.norms_are_frozen:
            for norm in _batch_norms(self.net):
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H / stride, W / stride), finest first: the laterals, then those for the neck.

        Args:
            images: (B, 3, H, W) RGB, float in 0..1 or uint8 in 0..255.
        """
        if not self.any_size and tuple(images.shape[-2:]) != self.image_size:
            (height, width), (h, w) = self.image_size, images.shape[-2:]
            raise UserError(
                f"backbone {self.config.name} was built for images of {height}x{width} and cannot take {h}x{w}: "
                f"set image_size, and no multi_scale, or choose another backbone"
            )
        images = self._normalized(images)
        if self._multiple > 1:
            images = _to_multiple(images, self._multiple)
        maps = self.net(images)
        maps = [maps[index].permute(0, 3, 1, 2) if self._channels_last else maps[index] for index in self._keep]
        if self.pyramid is None:
            return maps
        maps = self.pyramid(maps)
        if self.detail is None:
            return maps
        details = self.detail(images)
        count = len(details) - len(maps)
        fine = [torch.cat([x, resized(more, *x.shape[-2:])], 1) for x, more in zip(maps, details[count:])]
        return details[:count] + fine

    def fuse(self) -> Backbone:
        """Re-parameterise in place what timm can, and fold norms into convolutions; maps in eval mode stay the same."""
        from timm.utils.model import reparameterize_model

        size = [-(-side // self._multiple) * self._multiple for side in self.image_size]
        image = torch.empty(1, 3, *size, device="meta")
        self.net = reparameterize_model(self.net, inplace=True)
        fold_affine(fuse_modules(fold_norms(self.net, lambda net: net(image))))
        if self.detail is not None:
            fuse_modules(self.detail)
        elif not self._takes_pixels:
            self._fold_scale(observe(self.net, lambda net: net(image)).first)
        self.fused = True
        return self

    @torch.no_grad()
    def _fold_scale(self, name: str) -> None:
        """Let the first convolution, if nothing else reads the images, take them in 0..255 with the mean at 0.

        Its padding, which is 0, stands for the mean as before, so this is exact.
        """
        conv = self.net.get_submodule(name) if name else None
        if not isinstance(conv, nn.Conv2d) or conv.in_channels != 3 or conv.groups != 1:
            return
        weight = conv.weight.double() if conv.weight.device.type == "cpu" else conv.weight
        conv.weight.copy_(weight / (255 if self.std is None else 255 * self.std.to(weight)))
        self.register_buffer("_mean_pixel", None if self.mean is None else 255 * self.mean, persistent=False)
        self._takes_pixels = True

    def _normalized(self, images: Tensor) -> Tensor:
        """The network's input: in 0..1, or minus the mean and divided by the deviation, or as in ``_fold_scale``."""
        pixels = images.dtype == torch.uint8
        if self._takes_pixels:
            if self._mean_pixel is None:
                return images.to(next(self.net.parameters()).dtype) if pixels else 255 * images
            return images - self._mean_pixel if pixels else 255 * images - self._mean_pixel
        if pixels:
            images = images.to(next(self.net.parameters()).dtype) / 255
        return images if self.mean is None or self.std is None else (images - self.mean) / self.std

    def layers_from_end(self) -> dict[str, int]:
        """For every parameter of the network, by its name here, how many layers are between its layer and the last.

        Raises:
            UserError: the network's library does not say which layers it has.
        """
        return {f"net.{name}": layer for name, layer in layers_from_end(self.net, self.config.name).items()}

    def without_decay(self) -> list[str]:
        """Names here of the parameters that weight decay must leave alone, such as tokens and positions of a ViT."""
        return [f"net.{name}" for name in without_decay(self.net, self.config.name)]

    def set_normalization(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Use the normalisation that loaded weights were trained with: (3, 1, 1) each, or None for none."""
        like = next(self.net.parameters())
        self.mean = None if mean is None else mean.to(like)
        self.std = None if std is None else std.to(like)
        self.config.normalize = "none" if mean is None else "auto"


def check_backbone_name(name: str) -> None:
    """Raise UserError unless there is a network of this name, see ``BackboneConfig``."""
    if name.startswith(SMP):
        known = [SMP + encoder for encoder in smp_names()]
        if name not in known:
            raise UserError(f"backbone '{name}' is unknown to segmentation-models-pytorch: {did_you_mean(name, known)}")
        return
    if name in SIZES:
        return
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = [*timm.list_models(), *SIZES, *(SMP + encoder for encoder in smp_names())]
        raise UserError(f"backbone '{name}' is unknown to timm: {did_you_mean(base, known)}")
    tags = timm.list_pretrained(f"{base}.*")
    if tag and name not in tags:
        raise UserError(f"backbone '{base}' has no weights called '{tag}': choose one of {', '.join([base, *tags])}")


def freeze(module: nn.Module) -> None:
    """Exclude a module from training: no gradients, and eval mode in each forward pass, whatever its parent's mode."""
    module.requires_grad_(False)
    module.eval()
    module.register_forward_pre_hook(_set_eval)


def _set_eval(module: nn.Module, args: Any) -> None:
    """On module level, not a closure, so that frozen modules can be copied and pickled."""
    if module.training:
        module.eval()


def _batch_norms(net: nn.Module) -> list[nn.Module]:
    """Norms with statistics over the batch, those of torch and of timm, synchronised between processes or not."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _add_stage1_shortcut(net: nn.Module, name: str) -> None:
    """Add the projection that RT-DETR's ResNet-18/34 "vd" have on their first shortcut, initially the identity."""
    block = net.get_submodule("layer1.0") if hasattr(net, "layer1") else None
    if block is None or getattr(block, "downsample", "absent") is not None:
        raise UserError(f"model.backbone.stage1_shortcut is for resnet18d and resnet34d, not for {name}")
    channels = block.get_submodule("conv1").in_channels
    assert isinstance(channels, int)
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(conv.weight)
    block.downsample = nn.Sequential(nn.Identity(), conv, nn.BatchNorm2d(channels))  # indices as in the other stages


def _to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Resize the sides to the next multiple, as a ViT's patches need; positions relative to the image stay the same."""
    height, width = images.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return images
    size = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
