"""Start a machine again from a snapshot."""
