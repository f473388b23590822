"""How good a model is: multiple choice, exact match."""
