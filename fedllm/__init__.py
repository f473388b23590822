"""Several organisations make one language model together from text that none of them may share."""

__version__ = "0.1.0"
