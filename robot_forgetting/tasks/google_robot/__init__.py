"""SimplerEnv's tasks of the Google robot."""
