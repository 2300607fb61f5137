"""Experiments with learned strides: data, models, training, studies and commands. Needs the extra `train`."""
