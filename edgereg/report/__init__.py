"""Pages with charts: the curves of training runs, and what every page shares."""
