"""The engine for OpenAI-compatible servers: vLLM, llama.cpp, providers."""

from thrifty.engines.openai.engine import OpenAIEngine
from thrifty.engines.openai.transport import Timeouts

__all__ = ["OpenAIEngine", "Timeouts"]
