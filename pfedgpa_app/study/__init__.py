"""Many runs: sweeps, tuning, comparisons."""
