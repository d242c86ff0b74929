"""What was chosen and why, as data, text, JSON and an HTML page."""
