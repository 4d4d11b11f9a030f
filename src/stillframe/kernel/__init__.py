"""Linux interfaces for inspecting and changing another process. Knows no guest and no VM."""
