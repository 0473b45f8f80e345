"""The built-in data set: generated pictures with boxes, masks and keypoints, for every task without a download."""

from mvision.builtin.scene import CATEGORY_IDS, generate_image
from mvision.builtin.store import cache_dir, ensure_builtin, generate_builtin, has_builtin

__all__ = ["CATEGORY_IDS", "cache_dir", "ensure_builtin", "generate_builtin", "generate_image", "has_builtin"]
