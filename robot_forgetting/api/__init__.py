"""The Python API, and what the command line is made of: configurations, and the objects that they name."""
