"""RAM images: a snapshot's RAM as sparse files in shared memory, which VMs map while they are
filled (docs/concepts/images.md, DESIGN section 7)."""
