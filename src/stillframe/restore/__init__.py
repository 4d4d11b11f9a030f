"""Machines started again from a snapshot."""
