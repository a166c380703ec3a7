"""Environments and their data: vector environments, rollouts, replay, logged data, controllers, evaluation."""
