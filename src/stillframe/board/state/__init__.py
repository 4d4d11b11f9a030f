"""Declared device state: fields, handlers, save and load."""
