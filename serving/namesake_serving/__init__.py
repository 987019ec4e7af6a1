"""Serving of registered versions: vLLM behind an OpenAI-compatible endpoint."""
