"""Bundle and workload to report."""
