"""Whether a run is healthy, what it measures, and what it will cost."""
