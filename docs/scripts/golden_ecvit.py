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
from tests.golden_ecvit import CHANNELS, DIM, FILE, HEADS, MLP_RATIO, SIZES, make_images

MADE_BY = "docs/scripts/golden_ecvit.py from Intellindust-AI-Lab/EdgeCrafter 706d037"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    engine = parser.parse_args().edgecrafter / "ecdetseg" / "engine"
    adapter = original_module(engine, "ecvit").ViTAdapter
    torch.set_default_dtype(torch.float64)  # its positions have the default type
    original = adapter(
        name="ecvitt",
        embed_dim=DIM,
        num_heads=HEADS,
        ffn_ratio=MLP_RATIO,
        proj_dim=DIM,
        skip_load_backbone=True,
    ).eval()
    original.projector = nn.ModuleList(nn.Identity() for _ in original.projector)
    derived = original.backbone.rope_embed.periods
    tensors = {key: drawn(key, tuple(x.shape)) if x.ndim else x for key, x in original.backbone.state_dict().items()}
    original.backbone.load_state_dict({**tensors, "rope_embed.periods": derived})
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"{MADE_BY}, torch {torch.__version__}")}
    for case in SIZES:
        with torch.no_grad():
            maps = original(make_images(case))
        for level, x in enumerate(maps):
            arrays[f"{case} {level}"] = x[:1, :CHANNELS].numpy()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
