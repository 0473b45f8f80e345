"""Poses from queries: a head that finds people, animals or parts together with their points."""

from mvision.heads.poses.head import QueryPoseHead
from mvision.heads.poses.settings import PoseConfig

__all__ = ["PoseConfig", "QueryPoseHead"]
