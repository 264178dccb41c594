"""What people read of a comparison."""
