"""A run as one self-contained page: what federation bought, what crossed the wire, and the recipe."""
