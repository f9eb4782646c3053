"""Numbers for operators, in Prometheus' form: what is counted (`catalogue`), and who counts it (`metrics`)."""

from halyard.runtime.metrics.metrics import CONTENT_TYPE, Metrics

__all__ = ["CONTENT_TYPE", "Metrics"]
