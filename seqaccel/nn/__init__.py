"""Drop-in modules."""
