"""A federation between machines: what a site's desk allows, does and records, and what a server leads."""
