"""The bundle's folder: built, updated, described and published."""
