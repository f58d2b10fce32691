"""What is written into a run folder and read back."""
