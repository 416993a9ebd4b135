"""The soak: `mirror serve` under a mix of requests for a long time, what was observed, and the verdicts on it."""
