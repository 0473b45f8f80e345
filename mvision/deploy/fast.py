"""Moved to ``mvision.fast.prepare``, below ``Model``, whose ``predict`` prepares a copy of the model."""

from mvision.fast.prepare import PRECISIONS as PRECISIONS
from mvision.fast.prepare import prepare as prepare
