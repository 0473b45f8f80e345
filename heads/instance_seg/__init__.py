"""Instance segmentation."""

from mvision.heads.instance_seg.head import MaskConfig, MaskHead

__all__ = ["MaskConfig", "MaskHead"]
