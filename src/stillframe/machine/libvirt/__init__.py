"""Domains of libvirt: stock QEMUs whose monitor libvirtd holds."""
