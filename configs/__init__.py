"""Hydra config groups; each entry names a class by `_target_` and its plain arguments."""
