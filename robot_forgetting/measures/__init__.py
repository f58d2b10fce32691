"""What is recorded at a checkpoint: distances from the base policy and drifts, one file each."""
