"""The audit: whether what volsal says of a model can be believed."""
