"""What a person touches: recipes, the command line, the report."""
