"""What a recipe can do to documents: one verb, or one family of them, a module. registry.py lists them."""
