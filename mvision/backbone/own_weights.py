"""A file of weights for a backbone, with the names that the network's library gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from mvision.backbone.ecvit_names import DERIVED, OTHER_NAMES, SIZES
from mvision.backbone.feature_nets import SMP, whole_network
from mvision.errors import UserError
from mvision.storage.pickles import load_pickle, state_dict

PICKLES = (".pth", ".pt", ".bin")
COUNTER = "num_batches_tracked"


def load_file(net: nn.Module, file: str, name: str) -> None:
    """Load a file of weights into a network; all of them have to be in it.

    Names may have a common prefix, such as ``backbone.``. What is in the file besides the network's weights, such as a
    classifier, is left out. Learned positions are resized to the network's image size.

    Args:
        net: on the meta device it is only checked that the file fits.
        file: ``.safetensors``, or ``.pth``, ``.pt`` or ``.bin`` with tensors alone.
        name: the network's, for messages.

    Raises:
        UserError: one line: the file cannot be read, or a tensor is missing, of another shape, not finite, or of a
            layer that the network does not have.
    """
    path = Path(file)
    found = read_file(path)
    if name in SIZES:
        found = {_timm_name(key): tensor for key, tensor in found.items() if not key.endswith(DERIVED)}
    wanted = net.state_dict()
    by_library = {library_name(net, key): key for key in wanted}
    needed = {key for key in by_library if not key.endswith(COUNTER)}
    prefix = _prefix(found, needed, path)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
    way_out = f"give weights of {name}, or set model.backbone.name to the network that these are of"
    missing = [key for key in by_library if key in needed and key not in tensors]
    if missing:
        raise UserError(f"{_where(path)} has no tensor {prefix}{missing[0]}{_more(missing)}: {way_out}")
    unknown = [key for key in tensors if key not in by_library and _is_a_further_layer(key, needed)]
    if unknown and not _dropped(name, unknown[0]):
        raise UserError(f"{_where(path)} has a tensor {prefix}{unknown[0]}{_more(unknown)} that is unknown: {way_out}")
    fitting = {}
    for key, own in by_library.items():
        if key not in tensors:
            continue
        tensor = _resized_positions(net, own, tensors[key], wanted[own])
        if tensor.shape != wanted[own].shape:
            sizes = ["x".join(map(str, x.shape)) or "one" for x in (tensor, wanted[own])]
            raise UserError(f"{_where(path)}: {prefix}{key} is {sizes[0]}, and {name} has {sizes[1]}: {way_out}")
        if not tensor.isfinite().all():
            raise UserError(f"{_where(path)}: {prefix}{key} has NaN or infinity in it: give other weights")
        fitting[own] = tensor
    if not next(net.parameters()).is_meta:  # else only whether the file fits was asked
        net.load_state_dict(fitting, strict=False)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, without running code in it; raises UserError."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{_where(path)}: no such file")
    if suffix in PICKLES:
        content = load_pickle(path)
        inside = content.get("state_dict") if isinstance(content, Mapping) else None
        tensors = state_dict(inside if isinstance(inside, Mapping) else content, path)[0]
    elif suffix == ".safetensors":
        try:
            tensors = load_safetensors(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{_where(path)}: not a safetensors file, or damaged ({error})") from error
    else:
        raise UserError(f"{_where(path)}: give a file that ends in .safetensors, {', '.join(PICKLES)}")
    return tensors


def _timm_name(key: str) -> str:
    head, dot, last = key.rpartition(".")
    return f"{head}{dot}{OTHER_NAMES.get(last, last)}"


def library_name(net: nn.Module, key: str) -> str:
    """The name that a tensor of a feature network has in the whole network of its library.

    timm's wrappers put ``model.`` before it, or join the first two parts: ``stages_0.`` for ``stages.0.``.
    """
    kind = type(net).__name__
    if kind == "FeatureGetterNet":
        return key.removeprefix("model.")
    return re.sub(r"^([a-z_]+?)_(\d+)\.", r"\1.\2.", key) if kind.startswith("Feature") else key


def _prefix(found: Iterable[str], needed: set[str], path: Path) -> str:
    """What stands before the network's names in a file; UserError if the network is in it twice."""
    fitting: dict[str, int] = {}
    for name in found:
        places = [0, *(match.end() for match in re.finditer(r"\.", name))]
        for place in places:
            if name[place:] in needed:
                fitting[name[:place]] = fitting.get(name[:place], 0) + 1
    if not fitting:
        return ""
    complete = sorted(prefix for prefix, count in fitting.items() if count == len(needed))
    if len(complete) > 1 and "" not in complete:
        raise UserError(
            f"{_where(path)} has the network's weights more than once, below {' and '.join(complete)}: keep one of them"
        )
    return "" if "" in complete else max(fitting, key=lambda prefix: fitting[prefix])


def _is_a_further_layer(key: str, needed: set[str]) -> bool:
    """Whether a tensor is of a part that the network has too, such as ``blocks``: a file of a deeper network."""
    return key.split(".")[0] in {name.split(".")[0] for name in needed}


def _dropped(name: str, key: str) -> bool:
    """Whether the whole network of the library has this tensor, as one behind the last map that is taken."""
    if name in SIZES or name.startswith(SMP):
        return False
    return key in whole_network(name).state_dict()


def _resized_positions(net: nn.Module, own: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Learned positions for the network's image size, as timm resizes them; other tensors as they are."""
    model: Any = getattr(net, "model", net)
    if not own.endswith("pos_embed") or tensor.shape == like.shape or not hasattr(model, "num_prefix_tokens"):
        return tensor
    if tensor.ndim != 3 or tensor.shape[::2] != like.shape[::2]:
        return tensor
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = round((tensor.shape[1] - prefix) ** 0.5)
    if side < 1 or side**2 != tensor.shape[1] - prefix:
        return tensor
    size = list(model.patch_embed.grid_size)
    return resample_abs_pos_embed(tensor, new_size=size, num_prefix_tokens=prefix)


def _where(path: Path) -> str:
    return f"model.backbone.weights {path}"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
