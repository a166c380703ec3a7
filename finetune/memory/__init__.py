"""Memory: what training should need (formulas) and what it does need (meters)."""
