"""Where a number comes from: fingerprints of code, the lock file, lineage, verification."""
