"""The idea: types, tensor arithmetic, seeds, the plan check, the round, server optimisers."""
