"""What happens where the data is: rows, splits, models, what is learned, tasks, local training."""
