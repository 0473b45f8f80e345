"""Feature networks of timm and segmentation-models-pytorch behind one interface."""

from mvision.backbone.backbone import Backbone, check_backbone_name, freeze

__all__ = ["Backbone", "check_backbone_name", "freeze"]
