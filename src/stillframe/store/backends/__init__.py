"""Backends move bytes, and know nothing of what is in them."""
