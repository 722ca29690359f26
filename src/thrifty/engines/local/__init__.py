"""The local engine: transformers models with branches, batching and attachments (needs the extra `local`)."""
