"""The command line: parsing, output and exit codes. :mod:`stillframe.api` does the work."""
