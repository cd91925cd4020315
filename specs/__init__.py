"""What a person writes, and the words they may use."""
