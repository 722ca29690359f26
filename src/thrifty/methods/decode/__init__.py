"""The decode family."""
