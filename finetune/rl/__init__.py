"""Reinforcement learning, shared by the modules: tabular MDPs and what is exact about them; what is sampled."""
