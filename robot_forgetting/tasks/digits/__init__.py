"""Pictures of digits and garments."""
