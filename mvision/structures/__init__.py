"""The types that travel between the folders, and the arithmetic of boxes, masks and keypoints."""

from mvision.structures.instances import Category, Instances, Targets

__all__ = ["Category", "Instances", "Targets"]
