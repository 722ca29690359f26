"""The search family."""
