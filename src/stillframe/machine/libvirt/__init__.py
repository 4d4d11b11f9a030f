"""Domains of libvirt: stock QEMUs whose monitor belongs to libvirtd."""
