"""What each pretext sees of an image; files have the names of those in models/pretext."""
