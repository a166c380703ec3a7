"""Training data: conversations and their packing, Python's documentation, a toy directory."""
