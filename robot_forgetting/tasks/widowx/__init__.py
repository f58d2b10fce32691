"""SimplerEnv's tasks of the WidowX."""
