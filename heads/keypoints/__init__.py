"""Keypoints: the head of the shipped models, and one in its barest form."""

from mvision.heads.keypoints.head import KeypointConfig, KeypointHead
from mvision.heads.keypoints.minimal import MinimalKeypointConfig, MinimalKeypointHead

__all__ = ["KeypointConfig", "KeypointHead", "MinimalKeypointConfig", "MinimalKeypointHead"]
