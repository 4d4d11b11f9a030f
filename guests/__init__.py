"""Guests for Stillframe's tests, benchmarks and demo, built on demand.

Not part of the installed package. ``guests/README.md`` describes them.
"""
