"""Commands, examples, the README, and the benchmark machinery."""
