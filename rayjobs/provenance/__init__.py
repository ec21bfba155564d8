"""Where a picture says that it was made: its watermark and its content credentials."""
