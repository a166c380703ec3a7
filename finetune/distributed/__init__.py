"""Training on several ranks: processes, collectives, and ways to split a model, its states, its batch, its text."""
