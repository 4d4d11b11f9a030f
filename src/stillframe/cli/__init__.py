"""The command line: parse, show, exit code. The work is done by :mod:`stillframe.api`."""
