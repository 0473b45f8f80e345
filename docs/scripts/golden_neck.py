"""Maps of EdgeCrafter's original encoder for the settings of ``tests/golden_neck.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    python docs/scripts/golden_neck.py EdgeCrafter

The original code is imported from that folder and run as it is, in float64 (its position embedding stays float32). Of
its package, only the files of the encoder are imported; what they need of others stands in here for one process.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.drawn_weights import drawn
from tests.golden_neck import CASES, FILE, STRIDES, WIDTH, make_maps

MADE_BY = "docs/scripts/golden_neck.py from Intellindust-AI-Lab/EdgeCrafter 706d037"
NAMES = [
    (r"^encoder\.", "aifi."),
    (r"^fpn_blocks\.", "top_down."),
    (r"^pan_blocks\.", "bottom_up."),
    (r"^downsample_convs\.(\d+)\.0\.cv1\.", r"downsample_convs.\1.pointwise."),
    (r"^downsample_convs\.(\d+)\.0\.cv2\.", r"downsample_convs.\1.depthwise."),
    (r"\.cv1\.", ".conv1."),
    (r"\.cv2\.0\.", ".branch1.csp."),
    (r"\.cv3\.0\.", ".branch2.csp."),
    (r"\.cv4\.", ".conv2."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.conv3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.conv1x1."),
    (r"\.self_attn\.", ".attention."),
    (r"\.linear1\.", ".ffn.layers.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".ffn_norm."),
]
"""Name in the original -> name in mvision."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    encoder = encoder_class(parser.parse_args().edgecrafter / "ecdetseg" / "engine")
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"{MADE_BY}, torch {torch.__version__}")}
    for case, settings in CASES.items():
        original = encoder(
            in_channels=[WIDTH] * 3,
            feat_strides=STRIDES,
            hidden_dim=WIDTH,
            nhead=settings["num_heads"],
            dim_feedforward=settings["ffn_dim"],
            expansion=settings["expansion"],
            depth_mult=settings["depth"] / 3,
            csp_type="csp2",
            fuse_op="sum",
        )
        original.double().eval().load_state_dict({key: weights(key, x) for key, x in original.state_dict().items()})
        with torch.no_grad():
            maps = original(make_maps(case))
        for stride, x in zip(STRIDES, maps):
            arrays[f"{case} {stride}"] = x.float().numpy()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


def encoder_class(folder: Path) -> type[nn.Module]:
    """The class of the encoder, from the files in ``folder`` alone."""
    return original_module(folder, "hybrid_encoder").HybridEncoder


def original_module(folder: Path, name: str) -> types.ModuleType:
    """A module of EdgeCrafter's ``engine`` folder, whose other packages need not be installed."""
    for package, path in (("original", folder), ("original.edgecrafter", folder / "edgecrafter")):
        module = types.ModuleType(package)
        module.__path__ = [str(path)]
        sys.modules[package] = module
    core = types.ModuleType("original.core")
    core.register = lambda: lambda cls: cls  # type: ignore[attr-defined]
    misc = types.ModuleType("original.misc")
    misc.dist_utils = None  # type: ignore[attr-defined]  # for downloads
    sys.modules |= {core.__name__: core, misc.__name__: misc}
    return importlib.import_module(f"original.edgecrafter.{name}")


def weights(key: str, like: Tensor) -> Tensor:
    """What mvision's encoder has under the name that this tensor has there."""
    if key.endswith("num_batches_tracked"):
        return like
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    joined = re.match(r"(.*)\.in_proj_(weight|bias)$", key)
    if joined is None:
        return drawn(key, tuple(like.shape))
    shape = (len(like) // 3, *like.shape[1:])
    return torch.cat([drawn(f"{joined[1]}.{part}_proj.{joined[2]}", shape) for part in "qkv"])


if __name__ == "__main__":
    main()
