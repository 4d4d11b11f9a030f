"""Backends: they move bytes and know nothing of their meaning."""
