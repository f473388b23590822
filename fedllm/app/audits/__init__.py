"""`fedllm audit`: attacks on a run that was made here, with its own model and text."""
