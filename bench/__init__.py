"""Benchmarks: they run the peers beside us, record, and never fail on a figure."""
