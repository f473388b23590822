"""One readable file per family of methods, its paper in the first lines."""
