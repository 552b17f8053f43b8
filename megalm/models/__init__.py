"""Knows the order of layers."""
