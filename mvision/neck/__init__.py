"""The shared encoder between backbone and heads. Needs torch alone: the folder may be copied into another project."""

from mvision.neck.hybrid_encoder import HybridEncoder
from mvision.neck.layers import fuse_modules

__all__ = ["HybridEncoder", "fuse_modules"]
