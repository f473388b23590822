"""Ways to supply `exchange`, and the run folder that survives a kill."""
