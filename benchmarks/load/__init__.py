"""The load generator: one asyncio process with due times, its targets, its requests, and what it counts."""
