"""Pictures of results. It reads the fields of what it draws and imports no type of the other folders."""

from mvision.drawing.fonts import unwritable
from mvision.drawing.pictures import draw_instances, grid, side_by_side

__all__ = ["draw_instances", "grid", "side_by_side", "unwritable"]
