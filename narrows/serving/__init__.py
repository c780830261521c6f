"""Serving: requests that share a machine, and what their prompts and caches cost it."""
