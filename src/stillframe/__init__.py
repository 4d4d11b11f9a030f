"""Stillframe: background snapshots of running virtual machines."""
