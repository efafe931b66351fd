"""KV handover: which prompt tokens travel, and how they look on the wire."""
