"""Plain torch: knows shapes, knows no process group."""
