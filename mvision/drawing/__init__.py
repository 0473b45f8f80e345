"""Pictures of results. It reads the fields of what it draws and knows no type of the other folders."""

from mvision.drawing.draw import draw_instances, grid, side_by_side

__all__ = ["draw_instances", "grid", "side_by_side"]
