"""Reports: the results of sweeps as Markdown and as one HTML page. Files are read, nothing is decoded."""
