"""The embedded runtime: prefill and decode as two processes on one machine."""
