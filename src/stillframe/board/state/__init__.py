"""Declared device state: fields, handlers, saving and loading."""
