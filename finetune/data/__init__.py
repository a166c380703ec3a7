"""Training data: conversations and their packing, Python's documentation, a toy directory."""

from finetune.data.conversations import read_row as read_row
