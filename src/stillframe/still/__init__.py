"""The snapshot file (``.still``): writing, reading, verifying, and conversion to other forms.

The format is specified in ``docs/reference/file-format.md``. ``store/backends/`` moves the bytes.
"""
