"""A run: session, output folder, log, HTML page, meters and optimizer."""
