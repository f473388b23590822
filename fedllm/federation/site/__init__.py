"""A site: its desk, its policy and log, the worker on a guard, and the daemon that serves them."""
