"""The whole pipeline in five minutes."""
