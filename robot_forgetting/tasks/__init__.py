"""Tasks: robots in a simulator, questions in words, benchmarks, digits."""
