"""The datasets of the pretexts: what each pretext sees of an image. File names match those in models/pretext."""
