"""What SimplerEnv's scenes on SAPIEN 3 have in common: settings of the physics, the camera for videos, rows, steps."""

from __future__ import annotations

import torch
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs.types import DefaultMaterialsConfig, GPUMemoryConfig, SceneConfig, SimConfig


class Twin:
    """Before ManiSkill's digital twin in the list of bases. camera_link: what the robot's camera is mounted on"""

    camera_link = "base_link"

    def __init__(self, **kwargs):
        # ManiSkill's are the class's, and so every environment's
        self._rgb_overlay_images, self._objects_to_remove_from_greenscreen = {}, []
        super().__init__(**kwargs)

    @property
    def _on_gpu(self) -> bool:
        """Where PhysX makes contacts by PCM only, and other hulls of large ones: docs/gpu_simulation.md."""
        return self.device.type == "cuda"

    def _physics(self, sim_freq: int, control_freq: int, contact_offset: float, **scene) -> SimConfig:
        scene = SceneConfig(contact_offset=contact_offset, enable_pcm=self._on_gpu, enable_tgs=True, **scene)
        # On a GPU: far from the middle of a batch places are coarse (160 m: 15 micrometres), so that slow things would
        # not move; and a contact too many for its buffers is one that PhysX forgets.
        return SimConfig(
            sim_freq=sim_freq,
            control_freq=control_freq,
            spacing=5 if self._on_gpu else 20,
            scene_config=scene,
            default_materials_config=DefaultMaterialsConfig(static_friction=1.0, dynamic_friction=1.0),
            gpu_memory_config=GPUMemoryConfig(
                collision_stack_size=2**26, max_rigid_contact_count=2**21, max_rigid_patch_count=2**19
            ),
        )

    @property
    def _default_human_render_camera_configs(self):
        """For videos: the policy's view."""
        own, mount = self.agent._sensor_configs[0], self.agent.robot.links_map[self.camera_link]
        return CameraConfig("render_camera", own.pose, 512, 512, intrinsic=own.intrinsic, mount=mount)

    def _rows(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros [N, *shape]: what a scene keeps of an episode. ``Simulation.initial_state`` hands such tensors on."""
        return torch.zeros(self.num_envs, *shape, dtype=dtype, device=self.device)

    def _stepped(self) -> torch.Tensor:
        """[N] bool: which have moved since the flags were last asked for. A reset of one asks for the flags of all."""
        stepped = self._elapsed_steps != self._counted
        self._counted[:] = self._elapsed_steps
        return stepped
