"""The snapshot job: its state machine, and the pipeline of DESIGN section 2."""
