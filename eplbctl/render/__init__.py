"""From results to text. Nothing here knows how a result came about."""
