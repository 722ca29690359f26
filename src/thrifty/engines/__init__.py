"""What produces tokens: scripted, OpenAI-compatible servers, and local models."""
