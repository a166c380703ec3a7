"""Shared parts of deep RL agents: networks, targets and losses, the learner interface, off-policy evaluation."""
