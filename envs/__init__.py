"""Robot tasks, one file each: an environment, a scripted expert. They use the same public API as a user's own file."""
