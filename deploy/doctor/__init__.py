"""Is this machine fit to run bundles? Every finding with its remedy."""
