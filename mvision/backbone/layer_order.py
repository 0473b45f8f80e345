"""What the optimiser asks about the parameters of a backbone: which layer each is of, and which must not decay."""

from __future__ import annotations

from torch import nn

from mvision.backbone.ecvit_names import SIZES
from mvision.backbone.feature_nets import SMP, whole_network
from mvision.backbone.own_weights import library_name
from mvision.errors import UserError


def layers_from_end(net: nn.Module, name: str) -> dict[str, int]:
    """For every parameter of a feature network, the number of layers between its own and the last: 0 for the last.

    Layers are those of timm's ``group_matcher``: the stem, then every block.

    Raises:
        UserError: a network of another library, or one that timm has no groups of.
    """
    from timm.models import group_parameters

    whole = net if name in SIZES else None if name.startswith(SMP) else whole_network(name)
    if whole is None or not hasattr(whole, "group_matcher"):
        raise UserError(
            f"train.layer_decay: the order of the layers of backbone {name} is not known: set it to 1, or lower "
            "the rate of the whole backbone with train.backbone_lr"
        )
    matcher = whole.group_matcher(coarse=False)  # type: ignore[operator]
    layers: dict[str, int] = group_parameters(whole, matcher, reverse=True)
    own = {key: layers[library_name(net, key)] for key, _ in net.named_parameters()}
    order = sorted(set(own.values()))
    return {key: len(order) - 1 - order.index(layer) for key, layer in own.items()}


def without_decay(net: nn.Module, name: str) -> list[str]:
    """The parameters of a feature network that its library excludes from weight decay: ``no_weight_decay`` of timm.

    These are the class and register tokens and the learned positions of a ViT, and what few other networks have of the
    kind. Empty for networks of other libraries.
    """
    whole = net if name in SIZES else None if name.startswith(SMP) else whole_network(name)
    excluded = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()  # type: ignore[union-attr,operator]
    return [key for key, _ in net.named_parameters() if library_name(net, key) in excluded]
