"""The context family."""
