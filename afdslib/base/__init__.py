"""What everything else stands on: errors, paths, atomic files, texts, and ways around faults of the CPU's kernels."""
