"""Concerns of the loop that are not the loop."""
