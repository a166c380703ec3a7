"""What deep reinforcement learning agents share: networks, targets, losses, off-policy evaluation."""
