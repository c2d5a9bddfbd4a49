"""Figures of a finished run, `nd.pl`, and how they look."""
