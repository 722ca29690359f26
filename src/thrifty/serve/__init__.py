"""The gateway: an OpenAI-compatible server that stands before any upstream, applies plans and enforces budgets."""
