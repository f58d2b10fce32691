"""Reports, computed from run folders alone."""
