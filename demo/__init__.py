"""The whole way in five minutes."""
