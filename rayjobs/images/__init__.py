"""Pictures as bytes: decoded, encoded, with their parameters. PIL only."""
