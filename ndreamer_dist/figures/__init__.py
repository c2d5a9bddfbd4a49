"""Figures of a finished run, `nd.pl`, and their style."""
