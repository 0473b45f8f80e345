"""Keypoints."""

from mvision.heads.keypoints.head import KeypointConfig, KeypointHead

__all__ = ["KeypointConfig", "KeypointHead"]
