"""Plan and run studies of many runs: sweeps, tuning, comparisons, the paper's tables."""
