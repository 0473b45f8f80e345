"""The types that travel between the folders, and the arithmetic of boxes, masks and keypoints."""

from mvision.structures.category import Category
from mvision.structures.instances import Instances
from mvision.structures.targets import Targets

__all__ = ["Category", "Instances", "Targets"]
