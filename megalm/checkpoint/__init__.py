"""Checkpoint folders: write, verify, load."""
