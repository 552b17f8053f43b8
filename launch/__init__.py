"""Launch and supervise runs. Imports no torch."""
