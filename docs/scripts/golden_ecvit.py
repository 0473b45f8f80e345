"""Maps of EdgeCrafter's original ViT for the settings of ``tests/golden_ecvit.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    python docs/scripts/golden_ecvit.py EdgeCrafter

The original code is imported from that folder and run as it is, in float64. What its projections get is kept, which is
what mvision's backbone returns. Of its package, only the files of ViT and encoder are imported; what they need of
others stands in here for one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from golden_neck import original_module

from tests.drawn_weights import drawn
from tests.golden_ecvit import CHANNELS, FILE, NETWORKS, SIZES, key, make_images

MADE_BY = "docs/scripts/golden_ecvit.py from Intellindust-AI-Lab/EdgeCrafter 706d037"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    engine = parser.parse_args().edgecrafter / "ecdetseg" / "engine"
    adapter = original_module(engine, "ecvit").ViTAdapter
    torch.set_default_dtype(torch.float64)  # its positions have the default type
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"{MADE_BY}, torch {torch.__version__}")}
    for network, (dim, heads, mlp_ratio) in NETWORKS.items():
        original = adapter(
            name="ecvitt", embed_dim=dim, num_heads=heads, ffn_ratio=mlp_ratio, proj_dim=dim, skip_load_backbone=True
        ).eval()
        original.projector = nn.ModuleList(nn.Identity() for _ in original.projector)
        derived = original.backbone.rope_embed.periods
        state = original.backbone.state_dict()
        tensors = {name: drawn(name, tuple(x.shape)) if x.ndim else x for name, x in state.items()}
        original.backbone.load_state_dict({**tensors, "rope_embed.periods": derived})
        for size in SIZES:
            with torch.no_grad():
                maps = original(make_images(size))
            for level, x in enumerate(maps):
                arrays[key(network, size, level)] = x[:1, CHANNELS].numpy()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
