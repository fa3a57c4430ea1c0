"""Inspection of models and policies: trace, doctor and compare."""

from torchpi.inspect.compare import Comparison, compare_policies
from torchpi.inspect.diagnosis import Diagnosis, Finding
from torchpi.inspect.doctor import diagnose
from torchpi.inspect.trace import Trace, TraceEntry, trace_steps

__all__ = ["Comparison", "Diagnosis", "Finding", "Trace", "TraceEntry", "compare_policies", "diagnose", "trace_steps"]
