"""Run folder or encoder to bundle."""
