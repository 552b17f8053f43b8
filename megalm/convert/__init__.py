"""Hugging Face <-> megalm: one table of names per architecture, read in both directions."""
