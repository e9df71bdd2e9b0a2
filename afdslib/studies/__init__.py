"""Plans of many runs: profiles, protocols, choices on validation images, sweeps and comparisons, their tables."""
