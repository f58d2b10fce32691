"""OpenVLA, and small models in its layout."""

from robot_forgetting.policies.openvla.vla import OpenVLAPolicy, new_nano

__all__ = ["OpenVLAPolicy", "new_nano"]
