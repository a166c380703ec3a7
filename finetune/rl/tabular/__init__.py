"""Finite Markov decision processes: tables and exact values, named worlds, sampled episodes, pictures."""
