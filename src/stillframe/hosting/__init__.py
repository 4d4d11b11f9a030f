"""A board in this process: what surrounds it so that others find it, drive it and snapshot it."""
