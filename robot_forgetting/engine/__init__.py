"""The one loop of each kind: training, evaluation, a whole experiment, pre-training."""
