"""RL's Razor's controlled study with digits: the sweep and its page."""
