"""The paper's experiments, each run whole by `python -m fastsimgan.experiments NAME` and told in one report."""
