"""What every room may use: errors, files that are replaced at once, paths, caches, signals."""
