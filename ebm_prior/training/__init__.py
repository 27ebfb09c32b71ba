"""The parts of a training run: batches, limits, averages, what is written and read again."""
