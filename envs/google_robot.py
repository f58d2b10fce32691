"""SimplerEnv's Google-robot tasks: pick up a can, move a thing near another, drawers to open, close or fill."""

from __future__ import annotations

from mani_skill.utils.registration import register_env

from robot_forgetting.tasks.google_robot.cabinet import Drawer, PlaceInDrawer
from robot_forgetting.tasks.google_robot.move_near import MoveNear
from robot_forgetting.tasks.google_robot.scenes import PickCan

register_env("RobotForgetting-GoogleRobotPickCan-v1", max_episode_steps=80)(PickCan)
register_env("RobotForgetting-GoogleRobotMoveNear-v1", max_episode_steps=80)(MoveNear)
register_env("RobotForgetting-GoogleRobotDrawer-v1", max_episode_steps=113)(Drawer)
register_env("RobotForgetting-GoogleRobotPlaceInDrawer-v1", max_episode_steps=200)(PlaceInDrawer)
