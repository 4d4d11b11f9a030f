"""Guests that Stillframe's tests, benchmarks and demo run, built on the spot.

Not a part of the installed package. ``guests/README.md`` says what they do.
"""
