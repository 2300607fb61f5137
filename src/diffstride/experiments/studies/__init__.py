"""The paper's tables and figures, and ours: lists of runs and what is made of them."""
