"""Helpers of the store's tests: small streams, and sinks that fail as told."""
