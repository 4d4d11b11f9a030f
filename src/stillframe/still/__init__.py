"""The snapshot file (``.still``): write it, read it, verify it, turn it into other forms.

The format is specified in ``docs/reference/file-format.md``. ``backends/`` moves bytes only.
"""
