"""Hierarchical VAEs as the prior sees them: four methods on one flat u."""
