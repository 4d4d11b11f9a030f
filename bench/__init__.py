"""Benchmarks: they run Stillframe beside its peers, record, and never fail because of a figure."""
