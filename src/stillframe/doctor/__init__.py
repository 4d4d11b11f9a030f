"""What the host and its VMs lack for snapshots, and what to do about it."""
