"""What learning from preferences and rewards shares: rows, rewards, rollouts, KL, and a problem with a known answer."""
