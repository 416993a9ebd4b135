"""Raw text to run folder."""
