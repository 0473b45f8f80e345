"""Moved to ``mvision.fast.packed``, below ``Model``, whose ``predict`` prepares a copy of the model."""

from mvision.fast.packed import ACTIVATIONS as ACTIVATIONS
from mvision.fast.packed import PackedConv2d as PackedConv2d
from mvision.fast.packed import pack as pack
