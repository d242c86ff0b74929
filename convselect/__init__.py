"""convselect."""
