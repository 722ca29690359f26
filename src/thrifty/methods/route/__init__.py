"""Methods that decide who answers: a cache instead of an engine."""
