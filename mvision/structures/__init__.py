"""The types that travel between the folders, and the arithmetic of boxes, masks and keypoints."""

from mvision.structures.category import Category as Category
from mvision.structures.instances import Instances as Instances
from mvision.structures.targets import Targets as Targets
