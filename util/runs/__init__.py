"""A run: its session, folder, log, page, meters and optimizer."""
