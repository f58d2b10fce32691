"""What is recorded at a checkpoint: distances from the base policy, one file for those that share a pass."""
