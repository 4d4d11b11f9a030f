"""The board's hardware: vCPUs, devices, the machine that joins them."""
