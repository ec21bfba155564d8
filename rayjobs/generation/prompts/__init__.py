"""Where prompts come from: files, columns, templates, and the snapshot of them."""
