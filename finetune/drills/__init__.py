"""Coding drills: small tasks to write from memory, checked case by case in a process that cannot do harm."""
