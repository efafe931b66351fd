"""Prefill and decode on vLLM."""
