"""Robot tasks on ManiSkill3: simulation, rendering, worker processes, and the task class that yaml files configure."""
