"""Points in time of a VM's disks: overlays, copies, folding back (DESIGN section 8)."""
