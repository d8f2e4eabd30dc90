"""The training engine: Algorithm 1, the loop around it, and what a run writes."""
