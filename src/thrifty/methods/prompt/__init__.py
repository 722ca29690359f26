"""The prompt family."""
