"""Meters, FLOPs, where records go, and pictures."""
