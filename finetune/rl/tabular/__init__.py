"""Finite Markov decision processes: the tables, exact planning, known worlds, sampling."""
