"""What recipes are made of."""
