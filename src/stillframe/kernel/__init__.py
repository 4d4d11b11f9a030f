"""What Linux offers to a process that looks into another. Knows no guest and no VM."""
