"""Bytes and arrays, on a disk or an object store; nothing here knows of cells."""
