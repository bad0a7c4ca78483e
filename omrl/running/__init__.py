"""Running a pipeline's cells in parallel: ``omrl repro`` on Dask. DVC stays the one that runs and records a cell."""
