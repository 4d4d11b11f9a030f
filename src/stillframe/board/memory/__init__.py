"""Guest RAM of this process."""
