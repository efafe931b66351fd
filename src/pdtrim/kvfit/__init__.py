"""From a KV policy in a user's words, or a budget of bytes, to one rule a layer."""
