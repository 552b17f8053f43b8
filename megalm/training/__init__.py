"""The run: its config tree, the one place that joins the rooms, the loop and its callbacks."""
