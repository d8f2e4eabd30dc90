"""Numbers that judge refined images."""
