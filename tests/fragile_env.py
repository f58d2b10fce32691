"""ManiSkill's PushCube, but some initial states break: imported by the workers, as a user's own module would be."""

from __future__ import annotations

from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.utils.registration import register_env


@register_env("Fragile-PushCube-v1", max_episode_steps=100)
class FragilePushCubeEnv(PushCubeEnv):
    """Seeds that leave 3 when divided by 5 fail in the second step, those that leave 4 while they are reset."""

    def reset(self, seed=None, options=None):
        answer = super().reset(seed=seed, options=options)
        if isinstance(seed, int) and seed % 5 == 4:
            raise RuntimeError("no such initial state")
        return answer

    def evaluate(self):
        if int(self._episode_seed[0]) % 5 == 3 and int(self._elapsed_steps[0]) == 2:
            raise ZeroDivisionError("physics left the building\nsecond line")
        return super().evaluate()
