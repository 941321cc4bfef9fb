"""What scoring and serving rewards outside of training share."""
