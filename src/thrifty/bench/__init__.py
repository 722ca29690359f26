"""Tasks, scorers and runs: quality measured against spend."""
