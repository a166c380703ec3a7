"""Environments and their data: vectors of environments, rollouts, replay, logged data, evaluation."""
