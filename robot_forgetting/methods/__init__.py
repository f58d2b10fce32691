"""Fine-tuning methods and penalties, one file each."""
