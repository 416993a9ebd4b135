"""The suites: each is a function of plan, recorder and progress that adds measurements to the recorder."""
