"""The verbs that run on the device: a file for each, with its parser and its handler."""
