"""edgereg: from images, labelled or not, to a small, proved model on an embedded GPU."""

__version__ = "0.1.0"
