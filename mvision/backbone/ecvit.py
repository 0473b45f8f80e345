"""The ViTs of EdgeCrafter: rotary positions, and convolutions of stride 2 in place of patches of 16 x 16 pixels.

EdgeCrafter authors, "EdgeCrafter: Compact ViTs for Edge Dense Prediction via Task-Specialized Distillation", 2026. The
blocks are those of timm's ``Eva`` with the rotary positions of DINOv3, and have its names.
"""

from __future__ import annotations

import itertools

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from mvision.backbone.ecvit_names import PATCH, TAKEN, Size
from mvision.neck.layers import ConvNorm

DEPTH = 12


class ConvStem(nn.Module):
    """(B, 3, H, W) -> (B, H / 16, W / 16, dim) by four 3x3 convolutions of stride 2.

    It has what ``Eva`` asks of its ``patch_embed``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [3, dim // 8, dim // 4, dim // 2]
        self.convs = nn.Sequential(*(ConvNorm(a, b, 3, stride=2, act="relu") for a, b in itertools.pairwise(widths)))
        self.proj = nn.Conv2d(widths[-1], dim, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.convs(images)).permute(0, 2, 3, 1)

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the tokens of an image; each side is a multiple of 16."""
        return size[0] // PATCH, size[1] // PATCH


class EcViT(Eva):
    """Images (B, 3, H, W), sides multiples of 16 -> outputs (B, dim, H / 16, W / 16) of the last two blocks.

    No norm follows them: what comes after is for classification, and is left out.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(
            patch_size=PATCH,
            num_classes=0,
            global_pool="",
            embed_dim=size.dim,
            depth=DEPTH,
            num_heads=size.heads,
            mlp_ratio=size.mlp_ratio,
            attn_type="rope",
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=100.0,
            rope_rotate_half=True,
            use_post_transformer_norm=False,
            use_fc_norm=False,
            norm_layer=_norm,
            dynamic_img_size=True,
        )
        self.patch_embed = ConvStem(size.dim)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = self.forward_intermediates(images, indices=TAKEN, intermediates_only=True)
        assert isinstance(maps, list)
        return maps


def _norm(dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
