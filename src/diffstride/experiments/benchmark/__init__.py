"""Speed and memory of the layers beside their alternatives."""
