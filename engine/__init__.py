"""Shared infrastructure: files, flags, processes, channels, tables. It imports nothing of the project but itself."""
