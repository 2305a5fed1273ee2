"""From predictions to published numbers; one file a metric."""
